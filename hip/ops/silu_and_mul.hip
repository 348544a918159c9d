// SwiGLU: out[t] = silu(x[t, :d]) * x[t, d:]. All but the activation is in gated.h.
#include "wave64/gated.h"

WAVE64_GATED(silu_and_mul, silu)
