// GEGLU with GELU in its tanh form: out[t] = gelu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
//
// The trick: (1 + tanh(u)) / 2 is the logistic function of 2 u, so one exponential does.
#include "wave64/gated.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

WAVE64_DEVICE float gelu_tanh(float x) {
    const float u = 0.797884561f * (x + 0.044715f * x * x * x);
    return x * logistic(2 * u);
}

}  // namespace wave64
#endif

WAVE64_GATED(gelu_tanh_and_mul, gelu_tanh)
