// GEGLU with the exact GELU: out[t] = gelu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
//
// The trick: an erfc of our own, one polynomial without branches that is accurate in the tail as well.
#include "wave64/gated.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// erfc of z >= 0 as exp(-z^2) P(t) t, t = 1 / (1 + 0.3 z). P was fitted to erfc(z) exp(z^2) on [0, 9.5] for the minimal
// relative error, 2e-8; beyond that interval erfc is 0 in fp32.
WAVE64_DEVICE Floats2 erfc(Floats2 z) {
    const Floats2 divisor = fma(both(0.3f), z, both(1));
    const Floats2 t = {reciprocal(divisor.x), reciprocal(divisor.y)};
    Floats2 p = fma(both(-0.12943317076501037f), t, both(0.48509204315437604f));
    p = fma(p, t, both(-0.5112173147329285f));
    p = fma(p, t, both(0.5463845052620385f));
    p = fma(p, t, both(-0.09362383983190588f));
    p = fma(p, t, both(0.21443303404423902f));
    p = fma(p, t, both(0.14848329322313394f));
    p = fma(p, t, both(0.17069180742285078f));
    p = fma(p, t, both(0.1691896228064133f));
    const Floats2 power = both(-1.44269504f) * z * z;
    return p * t * Floats2{exp2(power.x), exp2(power.y)};
}

WAVE64_DEVICE Floats2 gelu(Floats2 x) {
    const Floats2 magnitude = {__builtin_fabsf(x.x), __builtin_fabsf(x.y)};
    const Floats2 below = both(0.5f) * erfc(both(0.707106781f) * magnitude);
    const Floats2 above = fma(below, both(-1), both(1));
    return x * Floats2{x.x > 0 ? above.x : below.x, x.y > 0 ? above.y : below.y};
}

}  // namespace wave64
#endif

WAVE64_GATED(gelu_and_mul, gelu)
