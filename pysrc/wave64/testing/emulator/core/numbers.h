// Arithmetic as arithmetic.py, bits.py and operations.py have it, for one lane; loops over lanes vectorize.

INLINE u32 exponent(float x) { return as_u32(x) >> 23 & 0xFF; }
INLINE int nan_f(float x) { return x != x; }
INLINE int finite_f(float x) { return exponent(x) != 0xFF; }
INLINE float magnitude(float x) { return as_f32(as_u32(x) & 0x7FFFFFFF); }
INLINE float sign_of(float size, float sign) {
    return as_f32((as_u32(size) & 0x7FFFFFFF) | (as_u32(sign) & 0x80000000));
}
INLINE float fma_f(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fma_d(double a, double b, double c) { return (double)((long double)a * b + c); }

// fp64 to fp16, rounded once: to fp32 with what is lost or-ed into the last bit, and from there
INLINE _Float16 half_of(double x) {
    u64 bits = as_u64(x);
    i64 power = (i64)(bits >> 52 & 0x7FF) - 1023;
    u32 sign = (u32)(bits >> 32) & 0x80000000, fraction = (u32)(bits >> 29) & 0x7FFFFF, lost = (bits & 0x1FFFFFFF) != 0;
    u32 mid = sign | (u32)(power + 127) << 23 | fraction | lost;
    u32 tiny = sign | (bits << 1 ? 0x01000000 : 0);  // rounds to zero
    u32 huge = power == 1024 && (bits & 0xFFFFFFFFFFFFF) ? 0x7FC00000 : sign | 0x7F800000;
    return (_Float16)as_f32(power < -120 ? tiny : power > 127 ? huge : mid);
}
INLINE _Float16 fma_h(_Float16 a, _Float16 b, _Float16 c) { return half_of((double)a * (double)b + (double)c); }

// the number where one is NaN, a signalling one made quiet; +0 over -0
#define EXTREMES(T, U, B, bits_of, of_bits, quiet)                                 \
    INLINE int signalling_##T(k_##T x) { return x != x && !(bits_of(x) & quiet); } \
    INLINE k_##T max_##T(k_##T a, k_##T b) {                                       \
        k_##T got = b != b ? a : a > b ? a : b;                                    \
        got = signalling_##T(b) ? of_bits(bits_of(b) | quiet) : got;               \
        got = signalling_##T(a) ? of_bits(bits_of(a) | quiet) : got;               \
        return a == b ? of_bits(bits_of(a) & bits_of(b)) : got;                    \
    }                                                                              \
    INLINE k_##T min_##T(k_##T a, k_##T b) {                                       \
        k_##T got = b != b ? a : a < b ? a : b;                                    \
        got = signalling_##T(b) ? of_bits(bits_of(b) | quiet) : got;               \
        got = signalling_##T(a) ? of_bits(bits_of(a) | quiet) : got;               \
        return a == b ? of_bits(bits_of(a) | bits_of(b)) : got;                    \
    }                                                                              \
    INLINE k_##T median_##T(k_##T a, k_##T b, k_##T c) {                           \
        k_##T least = min_##T(min_##T(a, b), c);                                   \
        k_##T middle = max_##T(min_##T(a, b), min_##T(max_##T(a, b), c));          \
        return a != a || b != b || c != c ? least : middle;                        \
    }
INLINE u16 as_u16(_Float16 x) { return __builtin_bit_cast(u16, x); }
INLINE _Float16 as_f16(u16 x) { return __builtin_bit_cast(_Float16, x); }
EXTREMES(f, u, 32, as_u32, as_f32, 0x400000u)
EXTREMES(h, w, 16, as_u16, as_f16, 0x200)
EXTREMES(d, U, 64, as_u64, as_f64, 0x8000000000000ull)

// ---- transcendental functions: in fp64, rounded once to fp32, denormals taken and given as zeros

INLINE float flushed(float x) { return magnitude(x) < 0x1p-126f ? sign_of(0, x) : x; }
INLINE double exp2_d(double x) {
    x = x > 1100 ? 1100 : x < -1100 ? -1100 : x;  // beyond fp32; NaN stays
    double whole = (x + 0x1.8p52) - 0x1.8p52, z = (x - whole) * 0x1.62e42fefa39efp-1, sum = 1.0 / 6227020800;
    sum = sum * z + 1.0 / 479001600, sum = sum * z + 1.0 / 39916800, sum = sum * z + 1.0 / 3628800;
    sum = sum * z + 1.0 / 362880, sum = sum * z + 1.0 / 40320, sum = sum * z + 1.0 / 5040;
    sum = sum * z + 1.0 / 720, sum = sum * z + 1.0 / 120, sum = sum * z + 1.0 / 24;
    sum = sum * z + 1.0 / 6, sum = sum * z + 0.5, sum = sum * z + 1.0, sum = sum * z + 1.0;
    double power = whole > 1023 ? 1023 : whole < -1022 ? -1022 : whole;
    u64 bits = as_u64(power + (0x1p52 + 1023)) << 52;  // the exponent lies in the low bits of the sum
    return x != x ? x : sum * as_f64(bits);
}
INLINE double log2_d(double x) {
    u64 bits = as_u64(x), shifted = bits - 0x3FE6A09E667F3BCDull;  // so that the fraction lies around 1
    i64 power = (i64)shifted >> 52;
    double m = as_f64(bits - ((u64)power << 52)), s = (m - 1) / (m + 1), z = s * s, sum = 1.0 / 25;
    sum = sum * z + 1.0 / 23, sum = sum * z + 1.0 / 21, sum = sum * z + 1.0 / 19, sum = sum * z + 1.0 / 17;
    sum = sum * z + 1.0 / 15, sum = sum * z + 1.0 / 13, sum = sum * z + 1.0 / 11, sum = sum * z + 1.0 / 9;
    sum = sum * z + 1.0 / 7, sum = sum * z + 1.0 / 5, sum = sum * z + 1.0 / 3, sum = sum * z + 1.0;
    double got = (double)(i32)power + 0x1.71547652b82fep+1 * (s * sum);
    got = x == __builtin_inf() ? x : x == 0 ? -__builtin_inf() : got;
    return x < 0 || x != x ? __builtin_nan("") : got;
}
#define THROUGH_F64(expression)        \
    ({                                 \
        double x = (double)flushed(a); \
        flushed((float)(expression));  \
    })

// ---- integers

INLINE u32 reversed(u32 x) { return __builtin_bitreverse32(x); }
INLINE u32 first_one(u64 x) { return x ? (u32)__builtin_ctzll(x) : ~0u; }
INLINE u32 zeros_above(u32 x) { return x ? (u32)__builtin_clz(x) : ~0u; }
INLINE u32 zeros_above_U(u64 x) { return x ? (u32)__builtin_clzll(x) : ~0u; }
INLINE u32 bits_u(u32 a, u32 first, u32 width) { return a >> first & (width >= 32 ? ~0u : (1u << width) - 1); }
INLINE i32 bits_i(i32 a, u32 first, u32 width) {
    u32 up = width == 0 ? 31 : 32 - (width < 32 ? width : 32);
    return width == 0 ? 0 : (i32)(bits_u((u32)a, first, width) << up) >> up;
}
INLINE u64 bits_U(u64 a, u32 first, u32 width) { return a >> first & (width >= 64 ? ALL : (1ull << width) - 1); }
INLINE i64 bits_I(i64 a, u32 first, u32 width) {
    u32 up = width == 0 ? 63 : 64 - (width < 64 ? width : 64);
    return width == 0 ? 0 : (i64)(bits_U((u64)a, first, width) << up) >> up;
}
INLINE u32 low24_u(u32 a) { return a & 0xFFFFFF; }
INLINE i32 low24_i(i32 a) { return (i32)((u32)a << 8) >> 8; }
INLINE u32 permuted(u64 data, u32 selector) {
    u32 got = 0;
    for (int i = 0; i < 4; i++) {
        u32 pick = selector >> 8 * i & 255;
        u32 sign = data >> (16 * (pick & 3) + 15) & 1 ? 255 : 0;
        u32 octet = pick < 8 ? data >> 8 * (pick & 7) & 255 : pick < 12 ? sign : pick == 12 ? 0 : 255;
        got |= octet << 8 * i;
    }
    return got;
}
INLINE u32 differences(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 32; i += 8) {
        u32 x = a >> i & 255, y = b >> i & 255;
        c += x > y ? x - y : y - x;
    }
    return c;
}
INLINE i64 clipped(i64 x, i64 low, i64 high) { return x < low ? low : x > high ? high : x; }
// toward zero, clamped; NaN gives 0
INLINE i64 whole(double x, double low, double high) { return x != x ? 0 : (i64)(x < low ? low : x > high ? high : x); }
INLINE i32 whole_i(double x) { return (i32)whole(x, -2147483648.0, 2147483647.0); }
INLINE u32 whole_u(double x) { return (u32)whole(x, 0, 4294967295.0); }

// ---- conversions

INLINE u16 toward_zero(float x) {
    u16 near = as_u16((_Float16)x);
    return magnitude((float)as_f16(near)) > magnitude(x) && finite_f(x) ? near - 1 : near;
}
INLINE u32 bf16_of(float x) {
    u32 bits = as_u32(x);
    return nan_f(x) ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
INLINE float of_bf16(u32 x) { return as_f32(x << 16); }
INLINE u32 halves(_Float16 low, _Float16 high) { return as_u16(low) | (u32)as_u16(high) << 16; }
// to a floating-point format of 8 bits: to nearest, ties to even
INLINE u32 octet_of(float x, int mantissa, int fnuz, u32 saturate) {
    int bias = (mantissa == 3 ? 7 : 15) + fnuz, smallest = 1 - bias;
    u32 finite = fnuz ? 128 : mantissa == 3 ? 127 : 124, none = fnuz ? 0x80 : 0x7F;
    u32 beyond = fnuz || mantissa == 3 ? none : finite, sign = as_u32(x) >> 31 << 7, code;
    if (nan_f(x))
        code = none;
    else if (!finite_f(x))
        code = saturate ? finite - 1 : beyond;
    else {
        double size = magnitude(x);
        int power = (int)(as_u64(size) >> 52) - 1023;  // a fp32 number is no denormal of fp64
        if (power < smallest) power = smallest;
        double unit = as_f64((u64)(power - mantissa + 1023) << 52);
        u32 rounded = (u32)((size / unit + 0x1p52) - 0x1p52), one = 1u << mantissa;
        u32 up = (u32)(power - smallest);
        u64 number = rounded < one ? rounded : ((u64)(up + 1) << mantissa) + (rounded - one);
        code = number < finite ? (u32)number : saturate ? finite - 1 : beyond;
    }
    return fnuz && (code == 0 || code == 0x80) ? code : code | sign;
}
INLINE u32 class_of(u64 bits, int width, int fraction) {  // the bit that v_cmp_class tests
    u64 ones = (1ull << fraction) - 1, low = bits & ones, top = (1ull << (width - 1 - fraction)) - 1;
    u64 power = bits >> fraction & top;
    int size = power == top ? 3 : power ? 2 : low ? 1 : 0, negative = (int)(bits >> (width - 1));
    if (power == top && low) return low >> (fraction - 1) ? 2 : 1;
    return 1u << (negative ? 5 - size : 6 + size);
}

// ---- the steps of a division

INLINE int tiny_ratio(float n, float d) {
    float ratio = magnitude(n / d);
    return ratio < 0x1p-126f && ratio != 0;
}
INLINE float div_scale(float a, float d, float n, u8* undo) {
    u32 is_d = as_u32(a) == as_u32(d), is_n = as_u32(a) == as_u32(n);
    float up = (float)((double)a * 0x1p64), down = (float)((double)a * 0x1p-64);
    int with_n = tiny_ratio(n, d);
    *undo = 0;
    if (n == 0 || d == 0) return __builtin_nanf("");
    if ((i32)exponent(n) - (i32)exponent(d) >= 96) return *undo = 1, is_d ? up : a;
    if (exponent(d) == 0) return up;
    if (exponent(d) >= 253 && finite_f(d)) return with_n ? (*undo = 1, is_d ? down : a) : down;
    if (with_n) return *undo = 1, is_n ? up : a;
    return exponent(n) <= 23 ? up : a;
}
INLINE float div_fmas(float a, float b, float c, u64 undo) {
    double exact = (double)a * b + c;
    float scaled = (float)(__builtin_fabs(exact) >= 1 ? exact * 0x1p64 : exact * 0x1p-64);
    return undo ? scaled : fma_f(a, b, c);
}
INLINE float div_fixup(float q, float d, float n) {
    u32 sign = (as_u32(d) ^ as_u32(n)) & 0x80000000;
    float none = as_f32(sign), infinite = as_f32(sign | 0x7F800000);
    i32 apart = (i32)exponent(n) - (i32)exponent(d);
    int infinite_d = magnitude(d) == __builtin_inff(), infinite_n = magnitude(n) == __builtin_inff();
    if (nan_f(n)) return as_f32(as_u32(n) | 0x400000);
    if (nan_f(d)) return as_f32(as_u32(d) | 0x400000);
    if ((d == 0 && n == 0) || (infinite_d && infinite_n)) return as_f32(0xFFC00000);
    if (d == 0 || infinite_n) return infinite;
    if (infinite_d || n == 0 || apart < -150) return none;
    return apart > 128 ? infinite : as_f32((as_u32(q) & 0x7FFFFFFF) | sign);
}
