// Packed instructions, and those that move between lanes, or between lanes and scalars.
// clang-format off: a table

// ---- two 16-bit operations: sources 0 to 2 are those of the low result, 3 to 5 those of the high one
#define HALVES(NAME, K, INPUTS, TAKEN, ...)                                \
    int NAME(Core *c, const Op *o) {                                       \
        WAVES {                                                            \
            Lanes made; k_##K part[2][LANES];                              \
            for (int half = 0; half < 2; half++) {                         \
                int first = 3 * half; INPUTS                               \
                LOOP { TAKEN part[half][i] = (k_##K)(__VA_ARGS__); }       \
            }                                                              \
            if (o->clamp) clamp_halves(part);                              \
            const u16 *low = (const u16 *)part[0], *high = (const u16 *)part[1]; \
            LOOP made.u[i] = low[i] | (u32)high[i] << 16;                  \
            put4(c, o, w, p, made.u);                                      \
        }                                                                  \
        return OK;                                                         \
    }
static void clamp_halves(void *part) {
    _Float16 *x = part;
    for (int i = 0; i < 2 * LANES; i++) x[i] = !(x[i] > 0) ? 0 : x[i] < 1 ? x[i] : 1;
}
#define P2(N, K, ...) \
    HALVES(N, K, IN(K, x, first) IN(K, y, first + 1), k_##K a = xs[i]; k_##K b = ys[i];, __VA_ARGS__)
#define P3(N, K, ...)                                              \
    HALVES(N, K, IN(K, x, first) IN(K, y, first + 1) IN(K, z, first + 2), \
           k_##K a = xs[i]; k_##K b = ys[i]; k_##K d = zs[i];, __VA_ARGS__)
P2(v_pk_add_f16, h, a + b)
P2(v_pk_mul_f16, h, a * b)
P3(v_pk_fma_f16, h, fma_h(a, b, d))
P2(v_pk_max_f16, h, max_h(a, b))
P2(v_pk_min_f16, h, min_h(a, b))
P2(v_pk_add_u16, w, a + b)
P2(v_pk_sub_u16, w, a - b)
P2(v_pk_add_i16, w, a + b)
P2(v_pk_sub_i16, w, a - b)
P2(v_pk_mul_lo_u16, w, (u32)a * b)
P3(v_pk_mad_u16, w, (u32)a * b + d)
P3(v_pk_mad_i16, w, (u32)a * b + d)
P2(v_pk_max_u16, w, a > b ? a : b)
P2(v_pk_min_u16, w, a < b ? a : b)
P2(v_pk_max_i16, s, a > b ? a : b)
P2(v_pk_min_i16, s, a < b ? a : b)
P2(v_pk_lshlrev_b16, w, b << (a & 15))
P2(v_pk_lshrrev_b16, w, b >> (a & 15))
P2(v_pk_ashrrev_i16, s, b >> (a & 15))

// ---- two 32-bit operations, into a pair of registers; both results are made before one is written
#define WORDS(NAME, K, INPUTS, TAKEN, ...)                                 \
    int NAME(Core *c, const Op *o) {                                       \
        WAVES {                                                            \
            k_##K part[2][LANES];                                          \
            for (int half = 0; half < 2; half++) {                         \
                int first = 3 * half; k_##K *r = part[half]; INPUTS        \
                LOOP { TAKEN r[i] = (__VA_ARGS__); }                       \
            }                                                              \
            for (int half = 0; half < 2; half++) {                         \
                if (o->clamp | o->flush) scaled4(o, (float *)part[half]);  \
                blend(vector(c, o->dst + half, w), (const u32 *)part[half], exec_of(c, w)); \
            }                                                              \
        }                                                                  \
        return OK;                                                         \
    }
#define W2(N, ...) \
    WORDS(N, f, IN(f, x, first) IN(f, y, first + 1), float a = xs[i]; float b = ys[i];, __VA_ARGS__)
W2(v_pk_add_f32, a + b)
W2(v_pk_mul_f32, a * b)
WORDS(v_pk_fma_f32, f, IN(f, x, first) IN(f, y, first + 1) IN(f, z, first + 2),
      float a = xs[i]; float b = ys[i]; float d = zs[i];, fma_f(a, b, d))
WORDS(v_pk_mov_b32, u, IN(u, x, first), u32 a = xs[i];, a)

// ---- fused multiply-adds of mixed precision (imm: which sources are fp16), and dot products
#define MIXED_SOURCES \
    float x[3][LANES]; \
    for (int k = 0; k < 3; k++) { \
        Lanes held; \
        if (o->imm >> k & 1) { const _Float16 *from = fetch_h(c, o, k, w, p, held.w); LOOP x[k][i] = (float)from[i]; } \
        else { const float *from = fetch_f(c, o, k, w, p, held.u); LOOP x[k][i] = from[i]; } \
    }
#define MIX(NAME, R)                                                       \
    int NAME(Core *c, const Op *o) {                                       \
        WAVES {                                                            \
            MIXED_SOURCES                                                  \
            Lanes made; k_##R *r = (k_##R *)&made; float sum[LANES];       \
            LOOP sum[i] = fma_f(x[0][i], x[1][i], x[2][i]);                \
            if (o->clamp | o->flush) scaled4(o, sum);                      \
            LOOP r[i] = (k_##R)sum[i];                                     \
            if (#R[0] == 'h') put2(c, o, w, p, made.w); else put4(c, o, w, p, made.u); \
        }                                                                  \
        return OK;                                                         \
    }
MIX(v_mad_mix_f32, f)
MIX(v_mad_mixlo_f16, h)
MIX(v_mad_mixhi_f16, h)
#define DOT2(NAME, K, widened)                                             \
    int NAME(Core *c, const Op *o) {                                       \
        WAVES {                                                            \
            Lanes made; float *r = out_f(&made);                           \
            IN(K, x, 0) IN(K, y, 1) IN(K, z, 3) IN(K, t, 4) IN(f, d, 5)    \
            LOOP r[i] = (float)((double)widened(xs[i]) * (double)widened(ys[i])                     \
                                + (double)widened(zs[i]) * (double)widened(ts[i]) + (double)ds[i]); \
            finish_f(r)                                                    \
        }                                                                  \
        return OK;                                                         \
    }
DOT2(v_dot2_f32_f16, h, (float))
DOT2(v_dot2_f32_bf16, w, of_bf16)
#define DOT4(NAME, T) V3(NAME, u, u, u, u, ({ u32 sum = d; \
    for (int k = 0; k < 32; k += 8) sum += (u32)((i32)(T)(a >> k) * (i32)(T)(b >> k)); sum; }))
DOT4(v_dot4_i32_i8, i8)
DOT4(v_dot4_u32_u8, u8)

// ---- lanes and scalars
static void know(Core *c, u32 reg, i64 w, u64 lanes, int is) {
    if (!c->known) return;
    u64 *at = c->known + reg * c->n + w;
    *at = is ? *at | lanes : *at & ~lanes;
    if (*at != ALL) c->sure[reg] = 0;
}
INLINE u64 known_of(const Core *c, u32 reg, i64 w) { return c->known ? c->known[reg * c->n + w] : ALL; }
int v_readfirstlane_b32(Core *c, const Op *o) {
    const Source *s = o->src;
    WAVES {
        u64 exec = exec_of(c, w);
        int lane = exec ? __builtin_ctzll(exec) : 0;
        u32 reg = s->kind == VECTOR ? s->reg : SCALAR + s->reg;
        int is = s->kind == CONSTANT || known_of(c, reg, w) >> lane & 1;
        scalars(c, w)[o->dst] = s->kind == VECTOR ? vector(c, s->reg, w)[lane] : (u32)scalar_bits(c, s, w, 4);
        know(c, SCALAR + o->dst, w, ALL, is || exec == 0);
    }
    return OK;
}
int v_readlane_b32(Core *c, const Op *o) {
    const Source *s = o->src, *which = o->src + 1;
    WAVES {
        u32 lane = (u32)scalar_bits(c, which, w, 4) & 63;
        int is = known_of(c, s->reg, w) >> lane & 1;
        if (which->kind == ONE) is &= (int)known_of(c, SCALAR + which->reg, w);
        scalars(c, w)[o->dst] = vector(c, s->reg, w)[lane];
        know(c, SCALAR + o->dst, w, ALL, is || exec_of(c, w) == 0);
    }
    return OK;
}
int v_writelane_b32(Core *c, const Op *o) {
    WAVES {
        u32 lane = (u32)scalar_bits(c, o->src + 1, w, 4) & 63;
        int is = 1;
        for (int k = 0; k < 2; k++)
            if (o->src[k].kind == ONE) is &= (int)known_of(c, SCALAR + o->src[k].reg, w);
        vector(c, o->dst, w)[lane] = (u32)scalar_bits(c, o->src, w, 4);
        know(c, o->dst, w, 1ull << lane, is);
    }
    return OK;
}
V1(v_accvgpr_read, u, u, a)
V1(v_accvgpr_write, u, u, a)
V1(v_accvgpr_read_b32, u, u, a)
V1(v_accvgpr_write_b32, u, u, a)
V1(v_accvgpr_mov_b32, u, u, a)
int v_nop(Core *c, const Op *o) { return OK; }
int v_swap_b32(Core *c, const Op *o) {
    WAVES {
        u32 *one = vector(c, o->dst, w), *other = vector(c, o->mask, w);
        Lanes kept;
        for (int i = 0; i < LANES; i++) kept.u[i] = one[i];
        blend(one, other, exec_of(c, w));
        blend(other, kept.u, exec_of(c, w));
    }
    return OK;
}
// gfx950: rows of the destination, every second from 1 on, change place with the source's rows before them
static int swap_rows(Core *c, const Op *o, int width) {
    WAVES if (exec_of(c, w) != ALL) return NUMPY;
    WAVES {
        u32 *one = vector(c, o->dst, w), *other = vector(c, o->mask, w);
        for (int row = width; row < LANES; row += 2 * width)
            for (int i = 0; i < width; i++) {
                u32 kept = one[row + i];
                one[row + i] = other[row - width + i];
                other[row - width + i] = kept;
            }
    }
    return OK;
}
int v_permlane16_swap_b32(Core *c, const Op *o) { return swap_rows(c, o, 16); }
int v_permlane32_swap_b32(Core *c, const Op *o) { return swap_rows(c, o, 32); }
