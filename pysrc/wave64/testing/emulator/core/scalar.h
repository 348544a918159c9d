// Scalar instructions: rows as in vector.h, of one number a wave; `carry` is SCC, and rows that set it say to what.
// clang-format off: a table

#define TAKE(K, x, k) k_##K x = (k_##K)scalar_bits(c, o->src + k, w, sizeof(k_##K)); (void)x;
INLINE void give_u(Core *c, const Op *o, i64 w, u32 x) { scalars(c, w)[o->dst] = x; }
INLINE void give_i(Core *c, const Op *o, i64 w, i32 x) { scalars(c, w)[o->dst] = (u32)x; }
INLINE void give_U(Core *c, const Op *o, i64 w, u64 x) { *(u64 *)(scalars(c, w) + o->dst) = x; }
INLINE void give_I(Core *c, const Op *o, i64 w, i64 x) { *(i64 *)(scalars(c, w) + o->dst) = x; }
#define SROW(NAME, R, INPUTS, AFTER, ...)                        \
    int NAME(Core *c, const Op *o) {                             \
        WAVES {                                                  \
            u8 carry = c->scc[w], flag = carry; INPUTS           \
            k_##R r = (k_##R)({ __VA_ARGS__; });                 \
            give_##R(c, o, w, r);                                \
            AFTER                                                \
            (void)flag;                                          \
        }                                                        \
        return OK;                                               \
    }
#define KEEPS
#define TESTS c->scc[w] = r != 0;  // SCC: the result is not zero
#define FLAGS c->scc[w] = flag;
#define S1(N, R, A, AFTER, ...) SROW(N, R, TAKE(A, a, 0), AFTER, __VA_ARGS__)
#define S2(N, R, A, B, AFTER, ...) SROW(N, R, TAKE(A, a, 0) TAKE(B, b, 1), AFTER, __VA_ARGS__)
#define SCMP(NAME, A, B, ...)                                    \
    int NAME(Core *c, const Op *o) {                             \
        WAVES { TAKE(A, a, 0) TAKE(B, b, 1) c->scc[w] = (__VA_ARGS__) != 0; } \
        return OK;                                               \
    }

S2(s_add_u32, u, u, u, FLAGS, u32 x = a + b; flag = x < a; x)
S2(s_sub_u32, u, u, u, FLAGS, flag = b > a; a - b)
S2(s_add_i32, u, u, u, FLAGS, u32 x = a + b; flag = ((a ^ x) & (b ^ x)) >> 31; x)
S2(s_sub_i32, u, u, u, FLAGS, u32 x = a - b; flag = ((a ^ b) & (a ^ x)) >> 31; x)
S2(s_addc_u32, u, u, u, FLAGS, u64 x = (u64)a + b + carry; flag = x >> 32 != 0; x)
S2(s_subb_u32, u, u, u, FLAGS, flag = (u64)b + carry > a; a - b - carry)
S2(s_min_i32, i, i, i, FLAGS, flag = a < b; flag ? a : b)
S2(s_min_u32, u, u, u, FLAGS, flag = a < b; flag ? a : b)
S2(s_max_i32, i, i, i, FLAGS, flag = a >= b; flag ? a : b)
S2(s_max_u32, u, u, u, FLAGS, flag = a >= b; flag ? a : b)
S2(s_cselect_b32, u, u, u, KEEPS, carry ? a : b)
S2(s_cselect_b64, U, U, U, KEEPS, carry ? a : b)
S2(s_lshl_b32, u, u, u, TESTS, a << (b & 31))
S2(s_lshl_b64, U, U, u, TESTS, a << (b & 63))
S2(s_lshr_b32, u, u, u, TESTS, a >> (b & 31))
S2(s_lshr_b64, U, U, u, TESTS, a >> (b & 63))
S2(s_ashr_i32, i, i, u, TESTS, a >> (b & 31))
S2(s_ashr_i64, I, I, u, TESTS, a >> (b & 63))
S2(s_bfm_b32, u, u, u, KEEPS, ((1u << (a & 31)) - 1) << (b & 31))
S2(s_bfm_b64, U, u, u, KEEPS, ((1ull << (a & 63)) - 1) << (b & 63))
S2(s_mul_i32, u, u, u, KEEPS, a * b)
S2(s_mul_hi_u32, u, u, u, KEEPS, (u64)a * b >> 32)
S2(s_mul_hi_i32, i, i, i, KEEPS, (i64)a * b >> 32)
S2(s_bfe_u32, u, u, u, TESTS, bits_u(a, b & 31, b >> 16 & 127))
S2(s_bfe_i32, i, i, u, TESTS, bits_i(a, b & 31, b >> 16 & 127))
S2(s_bfe_u64, U, U, u, TESTS, bits_U(a, b & 63, b >> 16 & 127))
S2(s_bfe_i64, I, I, u, TESTS, bits_I(a, b & 63, b >> 16 & 127))
S2(s_absdiff_i32, i, i, i, TESTS, i64 x = (i64)a - b; x < 0 ? -x : x)
#define SHIFT_ADD(n) \
    S2(s_lshl##n##_add_u32, u, u, u, FLAGS, u64 x = ((u64)a << n) + b; flag = x >> 32 != 0; x)
SHIFT_ADD(1)
SHIFT_ADD(2)
SHIFT_ADD(3)
SHIFT_ADD(4)
S2(s_pack_ll_b32_b16, u, u, u, KEEPS, (a & 0xFFFF) | b << 16)
S2(s_pack_lh_b32_b16, u, u, u, KEEPS, (a & 0xFFFF) | (b & 0xFFFF0000))
S2(s_pack_hh_b32_b16, u, u, u, KEEPS, a >> 16 | (b & 0xFFFF0000))
// of a and EXEC (b): the destination gets the old EXEC, or the new one
#define SAVES(NAME, NEW, ...)                                    \
    int NAME(Core *c, const Op *o) {                             \
        WAVES {                                                  \
            TAKE(U, a, 0) u64 b = exec_of(c, w), x = (__VA_ARGS__); \
            *(u64 *)(scalars(c, w) + EXEC) = x;                  \
            give_U(c, o, w, NEW ? x : b);                        \
            c->scc[w] = x != 0;                                  \
        }                                                        \
        return OK;                                               \
    }
#define LOGIC(name, ...)                                         \
    S2(s_##name##_b32, u, u, u, TESTS, __VA_ARGS__)              \
    S2(s_##name##_b64, U, U, U, TESTS, __VA_ARGS__)              \
    SAVES(s_##name##_saveexec_b64, 0, __VA_ARGS__)
LOGIC(and, a & b)
LOGIC(or, a | b)
LOGIC(xor, a ^ b)
LOGIC(andn2, a & ~b)
LOGIC(orn2, a | ~b)
LOGIC(nand, ~(a & b))
LOGIC(nor, ~(a | b))
LOGIC(xnor, ~(a ^ b))
SAVES(s_andn1_saveexec_b64, 0, ~a & b)
SAVES(s_orn1_saveexec_b64, 0, ~a | b)
SAVES(s_andn1_wrexec_b64, 1, ~a & b)
SAVES(s_andn2_wrexec_b64, 1, a & ~b)

S1(s_mov_b32, u, u, KEEPS, a)
S1(s_mov_b64, U, U, KEEPS, a)
S2(s_cmov_b32, u, u, u, KEEPS, carry ? a : b)
S2(s_cmov_b64, U, U, U, KEEPS, carry ? a : b)
S1(s_not_b32, u, u, TESTS, ~a)
S1(s_not_b64, U, U, TESTS, ~a)
S1(s_brev_b32, u, u, KEEPS, reversed(a))
S1(s_brev_b64, U, U, KEEPS, __builtin_bitreverse64(a))
S1(s_ff1_i32_b32, u, u, KEEPS, first_one(a))
S1(s_ff1_i32_b64, u, U, KEEPS, first_one(a))
S1(s_ff0_i32_b32, u, u, KEEPS, first_one((u32)~a))
S1(s_ff0_i32_b64, u, U, KEEPS, first_one(~a))
S1(s_flbit_i32_b32, u, u, KEEPS, zeros_above(a))
S1(s_flbit_i32_b64, u, U, KEEPS, zeros_above_U(a))
S1(s_flbit_i32, u, i, KEEPS, zeros_above((u32)(a < 0 ? ~a : a)))
S1(s_bcnt1_i32_b32, u, u, TESTS, __builtin_popcount(a))
S1(s_bcnt1_i32_b64, u, U, TESTS, __builtin_popcountll(a))
S1(s_bcnt0_i32_b32, u, u, TESTS, __builtin_popcount(~a))
S1(s_bcnt0_i32_b64, u, U, TESTS, __builtin_popcountll(~a))
S1(s_sext_i32_i8, i, u, KEEPS, (i8)a)
S1(s_sext_i32_i16, i, u, KEEPS, (i16)a)
S2(s_bitset0_b32, u, u, u, KEEPS, b & ~(1u << (a & 31)))
S2(s_bitset1_b32, u, u, u, KEEPS, b | 1u << (a & 31))
S2(s_bitset0_b64, U, u, U, KEEPS, b & ~(1ull << (a & 63)))
S2(s_bitset1_b64, U, u, U, KEEPS, b | 1ull << (a & 63))
S1(s_abs_i32, i, i, TESTS, (u32)(a < 0 ? 0u - (u32)a : (u32)a))
#define SORDERS(K, SUFFIX)                     \
    SCMP(s_cmp_eq_##SUFFIX, K, K, a == b)      \
    SCMP(s_cmp_lg_##SUFFIX, K, K, a != b)      \
    SCMP(s_cmp_gt_##SUFFIX, K, K, a > b)       \
    SCMP(s_cmp_ge_##SUFFIX, K, K, a >= b)      \
    SCMP(s_cmp_lt_##SUFFIX, K, K, a < b)       \
    SCMP(s_cmp_le_##SUFFIX, K, K, a <= b)      \
    SCMP(s_cmpk_eq_##SUFFIX, K, K, a == b)     \
    SCMP(s_cmpk_lg_##SUFFIX, K, K, a != b)     \
    SCMP(s_cmpk_gt_##SUFFIX, K, K, a > b)      \
    SCMP(s_cmpk_ge_##SUFFIX, K, K, a >= b)     \
    SCMP(s_cmpk_lt_##SUFFIX, K, K, a < b)      \
    SCMP(s_cmpk_le_##SUFFIX, K, K, a <= b)
SORDERS(i, i32)
SORDERS(u, u32)
SCMP(s_cmp_eq_u64, U, U, a == b)
SCMP(s_cmp_lg_u64, U, U, a != b)
SCMP(s_bitcmp0_b32, u, u, (a >> (b & 31) & 1) == 0)
SCMP(s_bitcmp1_b32, u, u, a >> (b & 31) & 1)
SCMP(s_bitcmp0_b64, U, u, (a >> (b & 63) & 1) == 0)
SCMP(s_bitcmp1_b64, U, u, a >> (b & 63) & 1)
S1(s_movk_i32, i, i, KEEPS, a)
S2(s_cmovk_i32, i, i, i, KEEPS, carry ? a : b)
S2(s_addk_i32, u, u, u, FLAGS, u32 x = a + b; flag = ((a ^ x) & (b ^ x)) >> 31; x)
S2(s_mulk_i32, u, u, u, KEEPS, a * b)

// ---- where to go on

int s_branch(Core *c, const Op *o) { return c->reached[c->pc] & 4 ? JUMP : NUMPY; }
// by how many waves jump: none, all, or some, who part from the others; a step that no check has seen is NumPy's
static int jump_of(Core *c, const Op *o, const u8 *taken, i64 jumping) {
    u8 seen = c->reached[c->pc];
    if ((jumping && !(seen & 4)) || (jumping < c->count && !(seen & 2))) return NUMPY;
    if (jumping == 0) return OK;
    if (jumping == c->count) return JUMP;
    WAVES c->pcs[w] = c->pc + (taken[p] ? o->jump : 1);
    return PART;
}
#define JUMPS(NAME, ...)                                         \
    int NAME(Core *c, const Op *o) {                             \
        u8 *taken = (u8 *)c->addresses;                          \
        i64 jumping = 0;                                         \
        WAVES jumping += taken[p] = (__VA_ARGS__) != 0;          \
        return jump_of(c, o, taken, jumping);                    \
    }
JUMPS(s_cbranch_scc0, !c->scc[w])
JUMPS(s_cbranch_scc1, c->scc[w])
JUMPS(s_cbranch_vccz, !pair(c, w, VCC))
JUMPS(s_cbranch_vccnz, pair(c, w, VCC))
JUMPS(s_cbranch_execz, !exec_of(c, w))
JUMPS(s_cbranch_execnz, exec_of(c, w))
int s_endpgm(Core *c, const Op *o) { return END; }
int s_barrier(Core *c, const Op *o) { return BARRIER; }
int nothing(Core *c, const Op *o) { return OK; }
