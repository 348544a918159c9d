// GEGLU with GELU in its tanh form: out[t] = gelu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
//
// The trick: (1 + tanh(u)) / 2 is the logistic function of 2 u, so one exponential does.
#include "wave64/gated.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

WAVE64_DEVICE Floats2 gelu_tanh(Floats2 x) {
    const Floats2 cubed = both(0.044715f) * x * x * x;
    return x * logistic(both(2 * 0.797884561f) * (x + cubed));
}

}  // namespace wave64
#endif

WAVE64_GATED(gelu_tanh_and_mul, gelu_tanh)
