// GEGLU with the exact GELU: out[t] = gelu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
//
// The trick: an erfc of our own, one polynomial without branches that is accurate in the tail as well.
#include "wave64/gated.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

// erfc of z >= 0 as exp(-z^2) P(t) t, t = 1 / (1 + 0.3 z). P was fitted to erfc(z) exp(z^2) on [0, 9.5] for the minimal
// relative error, 2e-8; beyond that interval erfc is 0 in fp32.
WAVE64_DEVICE float erfc(float z) {
    const float t = reciprocal(1 + 0.3f * z);
    float p = 0.48509204315437604f - 0.12943317076501037f * t;
    p = -0.5112173147329285f + p * t;
    p = 0.5463845052620385f + p * t;
    p = -0.09362383983190588f + p * t;
    p = 0.21443303404423902f + p * t;
    p = 0.14848329322313394f + p * t;
    p = 0.17069180742285078f + p * t;
    p = 0.1691896228064133f + p * t;
    return p * t * exp2(-1.44269504f * z * z);
}

WAVE64_DEVICE float gelu(float x) {
    const float below = 0.5f * erfc(0.707106781f * __builtin_fabsf(x));
    return x * (x > 0 ? 1 - below : below);
}

}  // namespace wave64
#endif

WAVE64_GATED(gelu_and_mul, gelu)
