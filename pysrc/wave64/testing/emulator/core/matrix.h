// Matrix instructions, as matrix.py has them: products of fp64 numbers, summed over k in order, rounded once with C.
// Op: src A, B, C, and the scales of A and B (shift: which byte); imm rows and columns, blocks and elements a lane
// holds; more the kinds of A, B and D. What a lane holds stays where it is: element e of lane l is held[e][l].

enum { M_F32, M_F16, M_BF16, M_I8, M_FP8, M_BF8 };
enum { D_F32, D_I32 };
typedef double Held[32][LANES] __attribute__((aligned(64)));
typedef double four __attribute__((vector_size(32)));

static void widen(const Core* c, int kind, u32 reg, i64 w, int count, Held to) {
    for (int e = 0; e < count; e++) {
        int part = kind == M_F32 ? 1 : kind <= M_BF16 ? 2 : 4, shift = e % part * (32 / part);
        const u32* from = vector(c, reg + e / part, w);
        double* held = to[e];
        switch (kind) {
            case M_F32:
                LOOP held[i] = (double)as_f32(from[i]);
                break;
            case M_F16:
                LOOP held[i] = (double)(float)as_f16((u16)(from[i] >> shift));
                break;
            case M_BF16:
                LOOP held[i] = (double)of_bf16(from[i] >> shift & 0xFFFF);
                break;
            case M_I8:
                LOOP held[i] = (double)(i32)(i8)(from[i] >> shift);
                break;
            default: {
                const float* table = c->decoded[kind - M_FP8];
                for (int i = 0; i < LANES; i++) held[i] = (double)table[from[i] >> shift & 255];
            }
        }
    }
}
// E8M0 scales; 255 is NaN. Of 32 consecutive k each, in the lane of row + size * (k / 32)
static void scale_by(const Core* c, const Source* s, i64 w, int size, int count, Held held) {
    const u32* from = vector(c, s->reg, w);
    for (int e = 0; e < count; e++)
        for (int l = 0; l < LANES; l++) {
            int half = count / 2, groups = LANES / size, k = e / half * (half * groups) + l / size * half + e % half;
            u32 code = from[l % size + size * (k / 32)] >> s->shift & 255;
            held[e][l] *= code == 255 ? __builtin_nan("") : as_f64((u64)(code + 1023 - 127) << 52);
        }
}
// a row of the result: columns of two rows of A, 16 at a time
INLINE void two_rows(const Held a, const Held b, int first, int row, int column, int step, int count, int groups,
                     int halves, double sums[2][16]) {
    four total[2][4] = {0};
    for (int h = 0; h < 1 + halves; h++)
        for (int g = 0; g < groups; g++)
            for (int e = h * count / 2; e < (halves ? (h + 1) * count / 2 : count); e++) {
                const four* right = (const four*)(b[e] + first + g * step + column);
                double one = a[e][first + g * step + row], other = a[e][first + g * step + row + 1];
                for (int j = 0; j < 4; j++) {
                    total[0][j] = __builtin_elementwise_fma((four){one, one, one, one}, right[j], total[0][j]);
                    total[1][j] = __builtin_elementwise_fma((four){other, other, other, other}, right[j], total[1][j]);
                }
            }
    __builtin_memcpy(sums, total, sizeof total);
}
#define ROW_LOOP _Pragma("clang loop vectorize(assume_safety)") for (int j = 0; j < count; j++)
INLINE void give_row(Core* c, const Op* o, i64 w, const Lanes* kept, int result, u32 reg, int lane, const double* sum,
                     const int count) {
    const Source* s = o->src + 2;
    u32 *to = vector(c, o->dst + reg, w) + lane, constant = s->low;
    const u32* from = o->unused ? kept[reg].u + lane : s->kind == VECTOR ? vector(c, s->reg + reg, w) + lane : NULL;
    if (result == D_I32) {
        for (int j = 0; j < count; j++) to[j] = (u32)(i64)sum[j] + (from ? from[j] : constant);
    } else if (from) {
        ROW_LOOP((float*)to)[j] = (float)(sum[j] + (double)((const float*)from)[j]);
    } else {
        ROW_LOOP((float*)to)[j] = (float)(sum[j] + (double)as_f32(constant));
    }
}
// an element of D is known where a row of A, a column of B and the element of C are
static void know_product(Core* c, const Op* o, i64 w, int all, int size, int blocks, int step) {
    int registers = size * size * blocks / LANES;
    u64 side[2] = {ALL, ALL};
    for (int k = 0; !all && k < 2; k++) {  // the rows, and the columns, in the lanes of the first group
        const Source *s = o->src + k, *scale = o->src + 3 + k;
        u64 lanes = scale->kind ? c->known[scale->reg * c->n + w] : ALL;
        for (u32 r = 0; r < o->read[k].count; r++) lanes &= c->known[(s->reg + r) * c->n + w];
        for (int i = step; i < LANES; i++)
            if (!(lanes >> i & 1)) lanes &= ~(1ull << i % step);
        side[k] = lanes;
    }
    u64 addend[32];
    for (int r = 0; r < registers; r++)
        addend[r] = o->src[2].kind == VECTOR ? c->known[(o->src[2].reg + r) * c->n + w] : ALL;
    for (int r = 0; r < registers; r++) {
        u64 known = ALL, *to = c->known + (o->dst + r) * c->n + w;
        for (int i = 0; !all && i < LANES; i++) {
            int block = size == 4 ? i / 4 : r / (size / 4 * size / 16), column = i % size;
            int row = size == 4 ? r : size == 16 ? 4 * (i / 16) + r % 4 : 8 * (r % 16 / 4) + 4 * (i / 32) + r % 4;
            if (!(side[0] >> (block * size + row) & side[1] >> (block * size + column) & 1)) known &= ~(1ull << i);
        }
        *to = known & addend[r];
        if (*to != ALL) c->sure[o->dst + r] = 0;
    }
}
int mfma(Core* c, const Op* o) {
    int size = o->imm & 63, blocks = o->imm >> 8 & 31, count = o->imm >> 16 & 63, halves = o->imm >> 24 & 1;
    int kind_a = o->more & 15, kind_b = o->more >> 4 & 15, result = o->more >> 8, step = size * blocks,
        groups = LANES / step;
    Held a, b;
    Lanes kept[32];  // C, where D overlaps it
    WAVES {
        if (c->known) know_product(c, o, w, c->fresh[p] == ALL, size, blocks, step);
        widen(c, kind_a, o->src[0].reg, w, count, a);
        widen(c, kind_b, o->src[1].reg, w, count, b);
        if (o->src[3].kind) {
            scale_by(c, o->src + 3, w, size, count, a);
            scale_by(c, o->src + 4, w, size, count, b);
        }
        for (int r = 0; o->unused && r < size * step / LANES; r++)
            __builtin_memcpy(kept + r, vector(c, o->src[2].reg + (u32)r, w), sizeof *kept);
        if (size == 4) {
            double sums[4][LANES] = {{0}};
            for (int e = 0; e < count; e++)
                for (int row = 0; row < 4; row++)
                    LOOP sums[row][i] = __builtin_fma(a[e][(i & ~3) + row], b[e][i], sums[row][i]);
            for (int row = 0; row < 4; row++) give_row(c, o, w, kept, result, (u32)row, 0, sums[row], LANES);
            continue;
        }
        for (int block = 0; block < blocks; block++)
            for (int column = 0; column < size; column += 16)
                for (int row = 0; row < size; row += 2) {
                    double sums[2][16] __attribute__((aligned(64)));
                    two_rows(a, b, block * size, row, column, step, count, groups, halves, sums);
                    for (int r = row; r < row + 2; r++) {
                        int reg = size == 16 ? 4 * block + r % 4 : 16 * block + 4 * (r / 8) + r % 4;
                        int lane = size == 16 ? r / 4 * 16 : 32 * (r / 4 & 1) + column;
                        give_row(c, o, w, kept, result, (u32)reg, lane, sums[r - row], 16);
                    }
                }
    }
    return OK;
}
