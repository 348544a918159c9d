// Vector instructions: a row has the name, the kinds of result and sources (as in operations.py) and what a lane's result
// is of its sources a, b and c.
// clang-format off: a table

#define IN(K, x, k) Lanes x##_; const k_##K *x##s = fetch_##K(c, o, k, w, p, (void *)&x##_);
#define ROW(NAME, R, INPUTS, TAKEN, ...)                                   \
    int NAME(Core *c, const Op *o) {                                \
        if (#R[0] == 'h' && overflows(c)) return NUMPY;                    \
        WAVES {                                                            \
            Lanes made; INPUTS                                             \
            k_##R *r = out_##R(&made);                                     \
            LOOP { TAKEN r[i] = (k_##R)(__VA_ARGS__); }                    \
            finish_##R(r)                                                  \
        }                                                                  \
        return OK;                                                         \
    }
#define V1(N, R, A, ...) ROW(N, R, IN(A, x, 0), k_##A a = xs[i];, __VA_ARGS__)
#define V2(N, R, A, B, ...) ROW(N, R, IN(A, x, 0) IN(B, y, 1), k_##A a = xs[i]; k_##B b = ys[i];, __VA_ARGS__)
#define V3(N, R, A, B, C, ...) \
    ROW(N, R, IN(A, x, 0) IN(B, y, 1) IN(C, z, 2), k_##A a = xs[i]; k_##B b = ys[i]; k_##C d = zs[i];, __VA_ARGS__)
// with a mask of lanes as third source, or as second result (`m`), or both
#define WITH_MASK(NAME, R, A, B, ...)                                      \
    int NAME(Core *c, const Op *o) {                                \
        WAVES {                                                            \
            Lanes made, chosen; IN(A, x, 0) IN(B, y, 1)                    \
            spread(mask_source(c, o, 2, w), chosen.u);                     \
            k_##R *r = out_##R(&made);                                     \
            LOOP { k_##A a = xs[i]; k_##B b = ys[i]; u32 m = chosen.u[i]; r[i] = (k_##R)(__VA_ARGS__); } \
            finish_##R(r)                                                  \
        }                                                                  \
        return OK;                                                         \
    }
#define GIVES_MASK(NAME, R, INPUTS, TAKEN, ...)                            \
    int NAME(Core *c, const Op *o) {                                \
        WAVES {                                                            \
            Lanes made, chosen; u8 flags[LANES]; INPUTS                    \
            spread(mask_source(c, o, 2, w), chosen.u);                     \
            k_##R *r = (k_##R *)&made;                                     \
            LOOP { u8 flag; u32 m = chosen.u[i] & 1; TAKEN r[i] = (k_##R)({ __VA_ARGS__ }); flags[i] = flag ? 255 : 0; } \
            finish_##R(r)                                                  \
            put_mask(c, o, w, packed(flags));                              \
        }                                                                  \
        return OK;                                                         \
    }
#define CARRY(N, ...) \
    GIVES_MASK(N, u, IN(u, x, 0) IN(u, y, 1), u32 a = xs[i]; u32 b = ys[i]; (void)m;, __VA_ARGS__)
#define COMPARE(NAME, A, B, ...)                                           \
    int NAME(Core *c, const Op *o) {                                \
        WAVES {                                                            \
            u8 flags[LANES]; IN(A, x, 0) IN(B, y, 1)                       \
            LOOP { k_##A a = xs[i]; k_##B b = ys[i]; flags[i] = (__VA_ARGS__) ? 255 : 0; } \
            put_mask(c, o, w, packed(flags));                              \
        }                                                                  \
        return OK;                                                         \
    }

// ---- moves and bits
V1(v_mov_b32, u, u, a)
V1(v_mov_b64, U, U, a)
V1(v_not_b32, u, u, ~a)
V1(v_bfrev_b32, u, u, reversed(a))
V1(v_ffbh_u32, u, u, zeros_above(a))
V1(v_ffbl_b32, u, u, first_one(a))
V1(v_ffbh_i32, u, i, zeros_above((u32)(a < 0 ? ~a : a)))
WITH_MASK(v_cndmask_b32, u, u, u, (a & ~m) | (b & m))
static u32 below(int lane, int half) { return (u32)(((1ull << lane) - 1) >> 32 * half); }
V2(v_mbcnt_lo_u32_b32, u, u, u, (u32)__builtin_popcount(a & below(i, 0)) + b)
V2(v_mbcnt_hi_u32_b32, u, u, u, (u32)__builtin_popcount(a & below(i, 1)) + b)
V2(v_bcnt_u32_b32, u, u, u, (u32)__builtin_popcount(a) + b)
V3(v_perm_b32, u, u, u, u, permuted((u64)a << 32 | b, d))
V3(v_alignbit_b32, u, u, u, u, ((u64)a << 32 | b) >> (d & 31))
V3(v_alignbyte_b32, u, u, u, u, ((u64)a << 32 | b) >> (d & 3) * 8)
V3(v_bfe_u32, u, u, u, u, bits_u(a, b & 31, d & 31))
V3(v_bfe_i32, i, i, u, u, bits_i(a, b & 31, d & 31))
V3(v_bfi_b32, u, u, u, u, (a & b) | (~a & d))
V2(v_bfm_b32, u, u, u, ((1u << (a & 31)) - 1) << (b & 31))
V2(v_pack_b32_f16, u, w, w, a | (u32)b << 16)

// ---- integers
V2(v_add_u32, u, u, u, a + b)
V2(v_sub_u32, u, u, u, a - b)
V2(v_subrev_u32, u, u, u, b - a)
V2(v_add_i32, i, u, u, a + b)
V2(v_sub_i32, i, u, u, a - b)
CARRY(v_add_co_u32, u32 sum = a + b; flag = sum < a; sum;)
CARRY(v_sub_co_u32, flag = b > a; a - b;)
CARRY(v_subrev_co_u32, flag = a > b; b - a;)
CARRY(v_addc_co_u32, u64 sum = (u64)a + b + m; flag = sum >> 32 != 0; sum;)
CARRY(v_subb_co_u32, flag = (u64)b + m > a; a - b - m;)
CARRY(v_subbrev_co_u32, flag = (u64)a + m > b; b - a - m;)
V2(v_and_b32, u, u, u, a & b)
V2(v_or_b32, u, u, u, a | b)
V2(v_xor_b32, u, u, u, a ^ b)
V2(v_xnor_b32, u, u, u, ~(a ^ b))
V2(v_min_u32, u, u, u, a < b ? a : b)
V2(v_max_u32, u, u, u, a > b ? a : b)
V2(v_min_i32, i, i, i, a < b ? a : b)
V2(v_max_i32, i, i, i, a > b ? a : b)
V2(v_lshlrev_b32, u, u, u, b << (a & 31))
V2(v_lshrrev_b32, u, u, u, b >> (a & 31))
V2(v_ashrrev_i32, i, u, i, b >> (a & 31))
V2(v_lshlrev_b64, U, u, U, b << (a & 63))
V2(v_lshrrev_b64, U, u, U, b >> (a & 63))
V2(v_ashrrev_i64, I, u, I, b >> (a & 63))
V2(v_mul_lo_u32, u, u, u, a * b)
V2(v_mul_hi_u32, u, u, u, (u64)a * b >> 32)
V2(v_mul_hi_i32, i, i, i, (i64)a * b >> 32)
V2(v_mul_u32_u24, u, u, u, low24_u(a) * low24_u(b))
V2(v_mul_i32_i24, i, i, i, (u32)low24_i(a) * (u32)low24_i(b))
V2(v_mul_hi_u32_u24, u, u, u, (u64)low24_u(a) * low24_u(b) >> 32)
V2(v_mul_hi_i32_i24, i, i, i, (i64)low24_i(a) * low24_i(b) >> 32)
V3(v_mad_u32_u24, u, u, u, u, low24_u(a) * low24_u(b) + d)
V3(v_mad_i32_i24, i, i, i, i, (u32)low24_i(a) * (u32)low24_i(b) + (u32)d)
#define MAD64(N, R, A, ...) \
    GIVES_MASK(N, R, IN(A, x, 0) IN(A, y, 1) IN(R, z, 2), k_##A a = xs[i]; k_##A b = ys[i]; k_##R d = zs[i]; (void)m;, \
               __VA_ARGS__)
MAD64(v_mad_u64_u32, U, u, u64 sum = (u64)a * b + d; flag = sum < d; sum;)
MAD64(v_mad_i64_i32, I, i, u64 product = (u64)((i64)a * b), sum = product + (u64)d;
      flag = (i64)(sum ^ ((product ^ sum) & ((u64)d ^ sum))) < 0; sum;)
V3(v_add3_u32, u, u, u, u, a + b + d)
V3(v_or3_b32, u, u, u, u, a | b | d)
V3(v_xad_u32, u, u, u, u, (a ^ b) + d)
V3(v_and_or_b32, u, u, u, u, (a & b) | d)
V3(v_lshl_add_u32, u, u, u, u, (a << (b & 31)) + d)
V3(v_lshl_add_u64, U, U, u, U, (a << (b & 7)) + d)
V3(v_add_lshl_u32, u, u, u, u, (a + b) << (d & 31))
V3(v_lshl_or_b32, u, u, u, u, a << (b & 31) | d)
V3(v_sad_u8, u, u, u, u, differences(a, b, d))
V2(v_cvt_pk_u16_u32, u, u, u, (a < 65535 ? a : 65535) | (b < 65535 ? b : 65535) << 16)
V2(v_cvt_pk_i16_i32, u, i, i, (clipped(a, -32768, 32767) & 0xFFFF) | (u32)clipped(b, -32768, 32767) << 16)
V3(v_min3_u32, u, u, u, u, ({ u32 x = a < b ? a : b; x < d ? x : d; }))
V3(v_max3_u32, u, u, u, u, ({ u32 x = a > b ? a : b; x > d ? x : d; }))
V3(v_min3_i32, i, i, i, i, ({ i32 x = a < b ? a : b; x < d ? x : d; }))
V3(v_max3_i32, i, i, i, i, ({ i32 x = a > b ? a : b; x > d ? x : d; }))
// with the clamp bit: clamped to the type, not wrapped
#define CLAMPED(K, SUFFIX, low, high)                                          \
    V2(v_add_##SUFFIX##_clamped, K, K, K, clipped((i64)a + b, low, high))      \
    V2(v_sub_##SUFFIX##_clamped, K, K, K, clipped((i64)a - b, low, high))      \
    V2(v_subrev_##SUFFIX##_clamped, K, K, K, clipped((i64)b - a, low, high))
CLAMPED(u, u32, 0, 0xFFFFFFFFll)
CLAMPED(i, i32, -0x80000000ll, 0x7FFFFFFF)
CLAMPED(w, u16, 0, 0xFFFF)
CLAMPED(s, i16, -0x8000, 0x7FFF)
#define MIDDLE(T) ({ T low = a < b ? a : b, high = a < b ? b : a, x = high < d ? high : d; low > x ? low : x; })
V3(v_med3_u32, u, u, u, u, MIDDLE(u32))
V3(v_med3_i32, i, i, i, i, MIDDLE(i32))

// ---- 16 bits
V2(v_add_u16, w, w, w, a + b)
V2(v_sub_u16, w, w, w, a - b)
V2(v_subrev_u16, w, w, w, b - a)
V2(v_mul_lo_u16, w, w, w, (u32)a * b)
V3(v_mad_u16, w, w, w, w, (u32)a * b + d)
V3(v_mad_legacy_u16, w, w, w, w, (u32)a * b + d)
V3(v_mad_i16, s, w, w, w, (u32)a * b + d)
V2(v_add_i16, s, w, w, a + b)
V2(v_sub_i16, s, w, w, a - b)
V2(v_min_u16, w, w, w, a < b ? a : b)
V2(v_max_u16, w, w, w, a > b ? a : b)
V2(v_min_i16, s, s, s, a < b ? a : b)
V2(v_max_i16, s, s, s, a > b ? a : b)
V2(v_lshlrev_b16, w, w, w, b << (a & 15))
V2(v_lshrrev_b16, w, w, w, b >> (a & 15))
V2(v_ashrrev_i16, s, w, s, b >> (a & 15))
V3(v_mad_u32_u16, u, w, w, u, (u32)a * b + d)
V3(v_mad_i32_i16, i, s, s, i, (u32)((i32)a * b) + (u32)d)

// ---- floating point
V3(v_fma_f32, f, f, f, f, fma_f(a, b, d))
V3(v_fmac_f32, f, f, f, f, fma_f(a, b, d))
V3(v_fmamk_f32, f, f, f, f, fma_f(a, b, d))
V3(v_fmaak_f32, f, f, f, f, fma_f(a, b, d))
V3(v_fma_f64, d, d, d, d, fma_d(a, b, d))
V3(v_fmac_f64, d, d, d, d, fma_d(a, b, d))
V3(v_fma_f16, h, h, h, h, fma_h(a, b, d))
V3(v_fma_legacy_f16, h, h, h, h, fma_h(a, b, d))
V3(v_fmac_f16, h, h, h, h, fma_h(a, b, d))
V2(v_mul_legacy_f32, f, f, f, a == 0 || b == 0 ? 0 : a * b)
V1(v_rcp_f32, f, f, THROUGH_F64(1 / x))
V1(v_rcp_iflag_f32, f, f, THROUGH_F64(1 / x))
V1(v_rsq_f32, f, f, THROUGH_F64(1 / __builtin_sqrt(x)))
V1(v_sqrt_f32, f, f, THROUGH_F64(__builtin_sqrt(x)))
V1(v_exp_f32, f, f, THROUGH_F64(exp2_d(x)))
V1(v_log_f32, f, f, THROUGH_F64(log2_d(x)))
V1(v_rcp_f64, d, d, 1 / a)
V1(v_rsq_f64, d, d, 1 / __builtin_sqrt(a))
V1(v_sqrt_f64, d, d, __builtin_sqrt(a))
V1(v_rcp_f16, h, h, (_Float16)(1 / (float)a))
V1(v_sqrt_f16, h, h, (_Float16)__builtin_sqrtf((float)a))
V1(v_rsq_f16, h, h, (_Float16)(1 / __builtin_sqrtf((float)a)))
INLINE double power(i32 n) { return as_f64((u64)(clipped(n, -600, 600) + 1023) << 52); }
V2(v_ldexp_f32, f, f, i, (float)((double)a * power(b)))
GIVES_MASK(v_div_scale_f32, f, IN(f, x, 0) IN(f, y, 1) IN(f, z, 2),
           float a = xs[i]; float b = ys[i]; float d = zs[i]; (void)m;, div_scale(a, b, d, &flag);)
int v_div_fmas_f32(Core *c, const Op *o) {
    WAVES {
        Lanes made; IN(f, x, 0) IN(f, y, 1) IN(f, z, 2)
        u64 undo = mask_source(c, o, 3, w);
        float *r = (float *)&made;
        LOOP r[i] = div_fmas(xs[i], ys[i], zs[i], undo >> i & 1);
        finish_f(r)
    }
    return OK;
}
V3(v_div_fixup_f32, f, f, f, f, div_fixup(a, b, d))
#define OF_EACH_FLOAT(T, SUFFIX, trunc_, ceil_, floor_, rint_)          \
    V2(v_add_##SUFFIX, T, T, T, a + b)                                  \
    V2(v_sub_##SUFFIX, T, T, T, a - b)                                  \
    V2(v_subrev_##SUFFIX, T, T, T, b - a)                               \
    V2(v_mul_##SUFFIX, T, T, T, a * b)                                  \
    V2(v_max_##SUFFIX, T, T, T, max_##T(a, b))                          \
    V2(v_min_##SUFFIX, T, T, T, min_##T(a, b))                          \
    V3(v_max3_##SUFFIX, T, T, T, T, max_##T(max_##T(a, b), d))          \
    V3(v_min3_##SUFFIX, T, T, T, T, min_##T(min_##T(a, b), d))          \
    V3(v_med3_##SUFFIX, T, T, T, T, median_##T(a, b, d))                \
    V1(v_trunc_##SUFFIX, T, T, trunc_(a))                               \
    V1(v_ceil_##SUFFIX, T, T, ceil_(a))                                 \
    V1(v_floor_##SUFFIX, T, T, floor_(a))                               \
    V1(v_rndne_##SUFFIX, T, T, rint_(a))
OF_EACH_FLOAT(f, f32, __builtin_truncf, __builtin_ceilf, __builtin_floorf, __builtin_rintf)
OF_EACH_FLOAT(h, f16, __builtin_truncf, __builtin_ceilf, __builtin_floorf, __builtin_rintf)
OF_EACH_FLOAT(d, f64, __builtin_trunc, __builtin_ceil, __builtin_floor, __builtin_rint)
V1(v_fract_f32, f, f, ({ float x = a - __builtin_floorf(a); finite_f(a) && x > 0x1.fffffep-1f ? 0x1.fffffep-1f : x; }))

// ---- conversions
V1(v_cvt_f32_f16, f, h, (float)a)
V1(v_cvt_f16_f32, h, f, (_Float16)a)
V1(v_cvt_f64_f32, d, f, (double)a)
V1(v_cvt_f32_f64, f, d, (float)a)
V1(v_cvt_f32_i32, f, i, (float)a)
V1(v_cvt_f32_u32, f, u, (float)a)
V1(v_cvt_f64_i32, d, i, (double)a)
V1(v_cvt_f64_u32, d, u, (double)a)
V1(v_cvt_f16_i16, h, s, (_Float16)(float)a)
V1(v_cvt_f16_u16, h, w, (_Float16)(float)a)
V1(v_cvt_i32_f32, i, f, whole_i(a))
V1(v_cvt_u32_f32, u, f, whole_u(a))
V1(v_cvt_i32_f64, i, d, whole_i(a))
V1(v_cvt_u32_f64, u, d, whole_u(a))
V1(v_cvt_i16_f16, s, h, whole((double)a, -32768, 32767))
V1(v_cvt_u16_f16, w, h, whole((double)a, 0, 65535))
V1(v_cvt_rpi_i32_f32, i, f, whole_i(__builtin_floor((double)a + 0.5)))
V1(v_cvt_flr_i32_f32, i, f, whole_i(__builtin_floor((double)a)))
V1(v_cvt_f32_ubyte0, f, u, (float)(a & 255))
V1(v_cvt_f32_ubyte1, f, u, (float)(a >> 8 & 255))
V1(v_cvt_f32_ubyte2, f, u, (float)(a >> 16 & 255))
V1(v_cvt_f32_ubyte3, f, u, (float)(a >> 24))
V1(v_cvt_off_f32_i4, f, u, (float)(i32)(a << 28) * 0x1p-32f)
V3(v_cvt_pk_u8_f32, u, f, u, u, (d & ~(255u << (b & 3) * 8)) | (u32)whole((double)a, 0, 255) << (b & 3) * 8)
V2(v_cvt_pkrtz_f16_f32, u, f, f, toward_zero(a) | (u32)toward_zero(b) << 16)
V1(v_cvt_f32_fp8, f, u, c->decoded[0][a & 255])
V1(v_cvt_f32_bf8, f, u, c->decoded[1][a & 255])
#define PAIR_OF(table) as_u32(table[a & 255]) | (u64)as_u32(table[a >> 8]) << 32
V1(v_cvt_pk_f32_fp8, U, w, PAIR_OF(c->decoded[0]))
V1(v_cvt_pk_f32_bf8, U, w, PAIR_OF(c->decoded[1]))
#define OCTETS(mantissa) ({ int z = (int)c->fnuz; u32 over = c->overflow[w]; \
    octet_of(a, mantissa, z, over) | octet_of(b, mantissa, z, over) << 8; })
V2(v_cvt_pk_fp8_f32, w, f, f, OCTETS(3))
V2(v_cvt_pk_bf8_f32, w, f, f, OCTETS(2))
V2(v_cvt_pk_bf16_f32, u, f, f, bf16_of(a) | bf16_of(b) << 16)
V2(v_cvt_pk_f16_f32, u, f, f, halves((_Float16)a, (_Float16)b))
V1(v_cvt_f32_bf16, f, w, of_bf16(a))

// ---- comparisons
#define BOTH(NAME, A, B, ...) COMPARE(v_cmp_##NAME, A, B, __VA_ARGS__) COMPARE(v_cmpx_##NAME, A, B, __VA_ARGS__)
#define ORDERS(K, SUFFIX)              \
    BOTH(lt_##SUFFIX, K, K, a < b)     \
    BOTH(eq_##SUFFIX, K, K, a == b)    \
    BOTH(le_##SUFFIX, K, K, a <= b)    \
    BOTH(gt_##SUFFIX, K, K, a > b)     \
    BOTH(ge_##SUFFIX, K, K, a >= b)
#define FLOAT_ORDERS(K, SUFFIX)                    \
    ORDERS(K, SUFFIX)                              \
    BOTH(lg_##SUFFIX, K, K, a < b || a > b)        \
    BOTH(o_##SUFFIX, K, K, a == a && b == b)       \
    BOTH(u_##SUFFIX, K, K, a != a || b != b)       \
    BOTH(neq_##SUFFIX, K, K, a != b)               \
    BOTH(nge_##SUFFIX, K, K, !(a >= b))            \
    BOTH(ngt_##SUFFIX, K, K, !(a > b))             \
    BOTH(nle_##SUFFIX, K, K, !(a <= b))            \
    BOTH(nlt_##SUFFIX, K, K, !(a < b))             \
    BOTH(nlg_##SUFFIX, K, K, !(a < b || a > b))
#define INTEGER_ORDERS(K, SUFFIX) ORDERS(K, SUFFIX) BOTH(ne_##SUFFIX, K, K, a != b)
FLOAT_ORDERS(f, f32)
FLOAT_ORDERS(h, f16)
FLOAT_ORDERS(d, f64)
INTEGER_ORDERS(i, i32)
INTEGER_ORDERS(u, u32)
INTEGER_ORDERS(I, i64)
INTEGER_ORDERS(U, u64)
INTEGER_ORDERS(s, i16)
INTEGER_ORDERS(w, u16)
BOTH(class_f32, u, u, (class_of(a, 32, 23) & b) != 0)
BOTH(class_f16, w, u, (class_of(a, 16, 10) & b) != 0)
BOTH(class_f64, U, u, (class_of(a, 64, 52) & b) != 0)

// ---- gfx950
#define ANY_OF_THREE(T) ({ T all = 0; for (int k = 0; k < 8; k++) \
    if (o->imm >> k & 1) all |= (k & 4 ? a : (T)~a) & (k & 2 ? b : (T)~b) & (k & 1 ? d : (T)~d); all; })
V3(v_bitop3_b32, u, u, u, u, ANY_OF_THREE(u32))
V3(v_bitop3_b16, w, w, w, w, ANY_OF_THREE(u16))
