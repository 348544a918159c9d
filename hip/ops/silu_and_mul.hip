// SwiGLU: out[t] = silu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
#include "wave64/gated.h"

#ifdef WAVE64_DEVICE_CODE
namespace wave64 {

WAVE64_DEVICE float silu(float x) { return x * logistic(x); }

}  // namespace wave64
#endif

WAVE64_GATED(silu_and_mul, silu)
