// The machine as the core sees it: the NumPy arrays of machine.py and of the checks, and instructions lowered to
// operands (lower.py). A handler executes one instruction for the waves of a party; it returns OK, or NUMPY before it
// has changed anything: then the NumPy path executes the instruction, or says what is wrong with it.
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t i8;
typedef int16_t i16;
typedef int32_t i32;
typedef int64_t i64;
// kinds of operands, by the letters of binding.py
typedef float k_f;
typedef _Float16 k_h;
typedef double k_d;
typedef u32 k_u;
typedef u16 k_w;
typedef u64 k_U;
typedef i32 k_i;
typedef i16 k_s;
typedef i64 k_I;

enum { LANES = 64, SGPRS = 128, VCC = 106, M0 = 124, EXEC = 126, SCALAR = 1000, SCC = 253 };
enum { FULL_WORD = 6 };                                              // SDWA: all of a register
enum { NONE, VECTOR, ONE, CONSTANT, SCC_BIT, VCCZ_BIT, EXECZ_BIT };  // what a source is
enum { NEGATE = 1, ABSOLUTE = 2, HIGH = 4, FLUSH = 8, QUIET = 16 };  // how it is modified; the last two: by MODE
enum { PLAIN, LOW_KEPT, HIGH_KEPT };                                 // where 16-bit results go
enum { DPP = 1, SDWA, CMPX = 4 };
enum { OK, NUMPY, JUMP, END, BARRIER, PART };                         // what a handler returns
enum { BY_LANE, BY_ALL, MATTERS, FROM_MEMORY, CHOSEN, OWN, UNSEEN };  // how what is written follows from what is read
enum { VM = 1, LGKM = 2, UNORDERED = 4 };                             // what a wait counts an instruction as

typedef struct {
    u8 kind, modifiers;
    u16 reg;
    u8 shift, width, extend, unused;  // SDWA
    u32 low, high;                    // of a constant
} Source;

typedef struct {
    u16 first, count;
} Range;

typedef struct Core Core;
typedef struct Op Op;
struct Op {
    int (*run)(Core*, const Op*);  // NULL: NumPy executes it
    i32 imm, more, jump;           // jump: dwords from here to the target
    u16 dst, mask;                 // vector or scalar register; scalar pair
    u8 words, rule, counter, modifier, place, omod, clamp, select, unused, reads, writes, watched, flush, spare[3];
    Source src[6];
    Range read[8], write[3], watch[9];
};

typedef struct {
    u8 lane[LANES];
    u64 there, written;  // lanes that have a lane to read; lanes that the masks of rows and banks write
    u64 zero;            // bound_ctrl
} Exchange;

typedef struct {
    i64 count;
    u64 lanes;
    i32 wave, width, offset[LANES];
} Stored;

struct Core {
    // registers and state
    u32 *v, *s;
    u8 *scc, *overflow, *states;
    i64 *pcs, *counts;
    const Op* ops;
    u8* reached;  // by pc: 1: checks have seen it, 2: its branch was not taken once, 4: taken
    const Exchange* exchanges;
    const float* decoded[2];  // fp8, bf8 of the architecture
    i64 n, length, group_waves, groups;
    // memory
    u8 *lds, *scratch;
    const u64 *load_start, *load_end, *store_start, *store_end;
    i64 ranges, lds_stride, lds_bytes, scratch_bytes;
    u64* addresses;  // scratch space, [2 n, 64]
    i32* at;         // and [n, 64]: offsets into the LDS of all workgroups
    i64 changes[2];  // in memory, in LDS; counted where `counting`
    i64 counting, fnuz;
    // checks; NULL where the check is off
    i64 *issued[2], *done[2], *due[2], *unordered[2];
    u8* busy;
    i64* met_with;
    Stored* stores;
    i64 stored, store_capacity, special;  // special: loads to LDS or late stores are followed, by NumPy
    i64 *direct_due, *direct_by;  // by byte of LDS, what a load past the registers brings: its count, and whose it is
    u64* known;
    u8 *sure, *written, *private;
    u8 *first[3], *last[3], *dirty;  // by byte of LDS, of reads, writes and atomics
    u8* atomics;                     // whether there were any
    i64 one_value;
    // the party
    i64 start, step, count, pc;
    u64* fresh;    // by wave of the party: lanes of which all that is read is known
    u64* enabled;  // by wave of the party: DPP's lanes
};

typedef union {
    u32 u[LANES];
    u64 U[LANES];
    u16 w[LANES];
    float f[LANES];
    double d[LANES];
} __attribute__((aligned(64))) Lanes;

#define WAVES for (i64 p = 0, w = c->start; p < c->count; p++, w += c->step)
#define LOOP _Pragma("clang loop vectorize(assume_safety)") for (int i = 0; i < LANES; i++)
#define ALL 0xFFFFFFFFFFFFFFFFull
#define SLOW __attribute__((noinline)) static
#define INLINE __attribute__((always_inline)) static inline

INLINE u32* vector(const Core* c, u32 reg, i64 w) { return c->v + (reg * c->n + w) * LANES; }
INLINE u32* scalars(const Core* c, i64 w) { return c->s + w * SGPRS; }
INLINE u64 pair(const Core* c, i64 w, u32 reg) { return *(const u64*)(scalars(c, w) + reg); }
INLINE u64 exec_of(const Core* c, i64 w) { return pair(c, w, EXEC); }
INLINE u32 as_u32(float x) { return __builtin_bit_cast(u32, x); }
INLINE float as_f32(u32 x) { return __builtin_bit_cast(float, x); }
INLINE u64 as_u64(double x) { return __builtin_bit_cast(u64, x); }
INLINE double as_f64(u64 x) { return __builtin_bit_cast(double, x); }

// ---- masks of lanes

INLINE u64 packed(const u8* lanes) {  // of bytes that are 0 or 255
    const __m256i* at = (const __m256i*)lanes;
    return (u32)_mm256_movemask_epi8(_mm256_loadu_si256(at)) |
           (u64)(u32)_mm256_movemask_epi8(_mm256_loadu_si256(at + 1)) << 32;
}
INLINE void spread(u64 mask, u32* to) {  // 0 or ~0 a lane
    u32 low = (u32)mask, high = (u32)(mask >> 32);
    for (int i = 0; i < 32; i++) to[i] = -(low >> i & 1);
    for (int i = 0; i < 32; i++) to[32 + i] = -(high >> i & 1);
}

// ---- sources

static u64 scalar_bits(const Core* c, const Source* s, i64 w, int size) {
    switch (s->kind) {
        case ONE:
            if (size == 8) return pair(c, w, s->reg);
            return size == 2 ? scalars(c, w)[s->reg] >> (s->modifiers & HIGH ? 16 : 0) & 0xFFFF : scalars(c, w)[s->reg];
        case CONSTANT:
            return s->low | (u64)s->high << 32;
        case SCC_BIT:
            return c->scc[w];
        case VCCZ_BIT:
            return pair(c, w, VCC) == 0;
        case EXECZ_BIT:
            return exec_of(c, w) == 0;
    }
    return 0;
}
INLINE u64 signed_bits(const Source* s, u64 x, int bits) {
    u64 sign = 1ull << (bits - 1);
    if (s->modifiers & ABSOLUTE) x &= ~sign;
    return s->modifiers & NEGATE ? x ^ sign : x;
}

SLOW void exchanged(Core* c, const Op* o, i64 w, i64 p, const u32* from, u32* to) {
    const Exchange* x = c->exchanges + o->more;
    u64 exec = exec_of(c, w), valid = x->there, on = 0;
    if (exec != ALL) {
        for (int i = 0; i < LANES; i++) on |= (exec >> x->lane[i] & 1) << i;
        valid &= on;
    }
    Lanes mask;
    spread(valid, mask.u);
    for (int i = 0; i < LANES; i++) to[i] = from[x->lane[i]] & mask.u[i];
    c->enabled[p] = x->zero ? x->written : x->written & valid;
}
SLOW void selected(const Source* s, const u32* from, u32* to) {
    u32 limit = s->width == 32 ? ~0u : (1u << s->width) - 1, up = 32 - s->width;
    if (s->extend)
        for (int i = 0; i < LANES; i++) to[i] = (i32)(from[i] >> s->shift << up) >> up;
    else
        for (int i = 0; i < LANES; i++) to[i] = from[i] >> s->shift & limit;
}
// 64 numbers of 32 bits: of the register itself where nothing is to be done to them
SLOW const u32* fetch4(Core* c, const Op* o, int k, i64 w, i64 p, u32* buffer) {
    const Source* s = o->src + k;
    const u32* from = buffer;
    if (s->kind == VECTOR)
        from = vector(c, s->reg, w);
    else {
        u32 x = (u32)scalar_bits(c, s, w, 4);
        for (int i = 0; i < LANES; i++) buffer[i] = x;
    }
    if ((o->modifier & 3) == DPP && k == 0) exchanged(c, o, w, p, from, buffer), from = buffer;
    if (s->width) selected(s, from, buffer), from = buffer;
    if (s->modifiers & ABSOLUTE) {
        for (int i = 0; i < LANES; i++) buffer[i] = from[i] & 0x7FFFFFFF;
        from = buffer;
    }
    if (s->modifiers & NEGATE) {
        for (int i = 0; i < LANES; i++) buffer[i] = from[i] ^ 0x80000000;
        from = buffer;
    }
    if (s->modifiers & FLUSH) {
        for (int i = 0; i < LANES; i++) buffer[i] = from[i] & 0x7F800000 ? from[i] : from[i] & 0x80000000;
        from = buffer;
    }
    if (s->modifiers & QUIET) {
        for (int i = 0; i < LANES; i++) buffer[i] = from[i] | ((from[i] & 0x7FFFFFFF) > 0x7F800000) << 22;
        from = buffer;
    }
    return from;
}
SLOW const u16* fetch2(Core* c, const Op* o, int k, i64 w, i64 p, u16* to) {
    const Source* s = o->src + k;
    Lanes wide;
    if (s->kind == VECTOR) {
        const u32* from = vector(c, s->reg, w);
        if (s->width) selected(s, from, wide.u), from = wide.u;
        int shift = s->modifiers & HIGH ? 16 : 0;
        for (int i = 0; i < LANES; i++) to[i] = (u16)(from[i] >> shift);
    } else {
        u64 x = scalar_bits(c, s, w, s->width ? 4 : 2);
        if (s->width) {
            for (int i = 0; i < LANES; i++) wide.u[i] = (u32)x;
            selected(s, wide.u, wide.u);
            x = wide.u[0];
        }
        for (int i = 0; i < LANES; i++) to[i] = (u16)x;
    }
    if (s->modifiers & (ABSOLUTE | NEGATE))
        for (int i = 0; i < LANES; i++) to[i] = (u16)signed_bits(s, to[i], 16);
    return to;
}
SLOW const u64* fetch8(Core* c, const Op* o, int k, i64 w, i64 p, u64* to) {
    const Source* s = o->src + k;
    if (s->kind == VECTOR) {
        const u32 *low = vector(c, s->reg, w), *high = vector(c, s->reg + 1, w);
        for (int i = 0; i < LANES; i++) to[i] = low[i] | (u64)high[i] << 32;
    } else {
        u64 x = scalar_bits(c, s, w, 8);
        for (int i = 0; i < LANES; i++) to[i] = x;
    }
    if (s->modifiers & (ABSOLUTE | NEGATE))
        for (int i = 0; i < LANES; i++) to[i] = signed_bits(s, to[i], 64);
    return to;
}
#define fetch_f (const float*)fetch4
#define fetch_u (const u32*)fetch4
#define fetch_i (const i32*)fetch4
#define fetch_h (const _Float16*)fetch2
#define fetch_w (const u16*)fetch2
#define fetch_s (const i16*)fetch2
#define fetch_d (const double*)fetch8
#define fetch_U (const u64*)fetch8
#define fetch_I (const i64*)fetch8

// ---- results

INLINE u64 lanes_written(const Core* c, const Op* o, i64 w, i64 p) {
    u64 exec = exec_of(c, w);
    return (o->modifier & 3) == DPP ? exec & c->enabled[p] : exec;
}
static void blend(u32* to, const u32* from, u64 lanes) {
    Lanes mask;
    spread(lanes, mask.u);
    for (int i = 0; i < LANES; i++) to[i] = (from[i] & mask.u[i]) | (to[i] & ~mask.u[i]);
}
SLOW void put4(Core* c, const Op* o, i64 w, i64 p, const u32* from) {
    u32* to = vector(c, o->dst, w);
    Lanes placed;
    if ((o->modifier & 3) == SDWA && o->select != FULL_WORD) {
        int shift = o->select < 4 ? 8 * o->select : 16 * (o->select - 4), width = o->select < 4 ? 8 : 16;
        u32 limit = (1u << width) - 1;
        for (int i = 0; i < LANES; i++) {
            u32 x = from[i] & limit;
            if (o->unused == 1) x = (u32)((i32)(x << (32 - width)) >> (32 - width));
            placed.u[i] = o->unused == 2 ? (to[i] & ~(limit << shift)) | x << shift : x << shift;
        }
        from = placed.u;
    }
    u64 lanes = lanes_written(c, o, w, p);
    if (lanes != ALL)
        blend(to, from, lanes);
    else if (to != from)
        for (int i = 0; i < LANES; i++) to[i] = from[i];
}
SLOW void put2(Core* c, const Op* o, i64 w, i64 p, const u16* from) {
    u32* old = vector(c, o->dst, w);
    Lanes wide;
    if (o->place == HIGH_KEPT)
        for (int i = 0; i < LANES; i++) wide.u[i] = (old[i] & 0xFFFF) | (u32)from[i] << 16;
    else if (o->place == LOW_KEPT)
        for (int i = 0; i < LANES; i++) wide.u[i] = (old[i] & 0xFFFF0000) | from[i];
    else
        for (int i = 0; i < LANES; i++) wide.u[i] = from[i];
    put4(c, o, w, p, wide.u);
}
SLOW void put8(Core* c, const Op* o, i64 w, i64 p, const u64* from) {
    Lanes part;
    u64 lanes = lanes_written(c, o, w, p);
    for (int k = 0; k < 2; k++) {
        for (int i = 0; i < LANES; i++) part.u[i] = (u32)(from[i] >> 32 * k);
        blend(vector(c, o->dst + k, w), part.u, lanes);
    }
}
// what is told from NaN is 0, as the kernels' DX10_CLAMP has it
#define SCALED(T, scale)                                                                                \
    T k = ((T[]){(T)1, (T)2, (T)4, (T)0.5})[o->omod];                                                   \
    for (int i = 0; i < LANES; i++) {                                                                   \
        T x = r[i] * k;                                                                                 \
        if (o->clamp) x = !(x > (T)0) ? (T)0 : x < (T)1 ? x : (T)1;                                     \
        if (o->flush && __builtin_fabsf((float)x) < 0x1p-126f) x = (T)__builtin_copysignf(0, (float)x); \
        r[i] = x;                                                                                       \
    }
SLOW void scaled4(const Op* o, float* r){SCALED(float, 1)} SLOW
    void scaled2(const Op* o, _Float16* r){SCALED(_Float16, 1)} SLOW
    void scaled8(const Op* o, double* r){SCALED(double, 1)}
// FP16_OVFL: an infinite result is one that the NumPy path refuses, or clamps
INLINE int overflows(const Core* c) {
    WAVES if (c->overflow[w]) return 1;
    return 0;
}
INLINE int direct(const Core* c, const Op* o, i64 w) {
    return !o->modifier && !o->omod && !o->clamp && !o->flush && exec_of(c, w) == ALL;
}
#define out4(r) (direct(c, o, w) ? vector(c, o->dst, w) : (u32*)(r))
#define out2(r) (r)
#define out8(r) (r)
#define finish4(r, scaling)                         \
    if ((u32*)(r) != vector(c, o->dst, w)) {        \
        if (o->omod | o->clamp | o->flush) scaling; \
        put4(c, o, w, p, (const u32*)(r));          \
    }
#define finish_f(r) finish4(r, scaled4(o, r))
#define finish_u(r) finish4(r, (void)0)
#define finish_i(r) finish4(r, (void)0)
#define finish_h(r)                            \
    {                                          \
        if (o->omod | o->clamp) scaled2(o, r); \
        put2(c, o, w, p, (const u16*)(r));     \
    }
#define finish_w(r) put2(c, o, w, p, (const u16*)(r));
#define finish_s(r) put2(c, o, w, p, (const u16*)(r));
#define finish_d(r)                            \
    {                                          \
        if (o->omod | o->clamp) scaled8(o, r); \
        put8(c, o, w, p, (const u64*)(r));     \
    }
#define finish_U(r) put8(c, o, w, p, (const u64*)(r));
#define finish_I(r) put8(c, o, w, p, (const u64*)(r));
#define out_f(r) (float*)out4(r)
#define out_u(r) (u32*)out4(r)
#define out_i(r) (i32*)out4(r)
#define out_h(r) (_Float16*)out2(r)
#define out_w(r) (u16*)out2(r)
#define out_s(r) (i16*)out2(r)
#define out_d(r) (double*)out8(r)
#define out_U(r) (u64*)out8(r)
#define out_I(r) (i64*)out8(r)

INLINE void put_mask(Core* c, const Op* o, i64 w, u64 lanes) {
    lanes &= exec_of(c, w);
    *(u64*)(scalars(c, w) + o->mask) = lanes;
    if (o->modifier & CMPX) *(u64*)(scalars(c, w) + EXEC) = lanes;
}
// a mask of lanes that is a source: VOP3's third operand, or VCC
INLINE u64 mask_source(Core* c, const Op* o, int k, i64 w) { return scalar_bits(c, o->src + k, w, 8); }
