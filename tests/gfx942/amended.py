"""Pseudo-code where the manual's is not what the hardware does, or where it has none, for models.py."""

from pseudocode import published

#: where the CDNA manual's text is not what the hardware does, by other sources
AMENDED = {
    # LLVM (FeatureFmaMixInsts): gfx906 and later fuse
    **{name: published()[name].replace("in[0] * in[1] + in[2]", "fma(in[0], in[1], in[2])")
       for name in ("v_mad_mix_f32", "v_mad_mixlo_f16", "v_mad_mixhi_f16")},
    # VCC is a mask of lanes. Where 1 / d is denormal, scaling d up, as printed, would overflow: the compilers' division
    # (which test_instructions.py holds to correct rounding) needs it scaled down
    "v_div_scale_f32": """
VCC.u64[laneId] = 1'0U; D0.f32 = S0.f32;
if ((S2.f32 == 0.0F) || (S1.f32 == 0.0F)) then D0.f32 = NAN.f32
elsif exponent(S2.f32) - exponent(S1.f32) >= 96 then
VCC.u64[laneId] = 1'1U; if S0.u32 == S1.u32 then D0.f32 = ldexp(S0.f32, 64) endif
elsif S1.f32 == DENORM.f32 then D0.f32 = ldexp(S0.f32, 64)
elsif ((exponent(S1.f32) >= 253) && (exponent(S1.f32) < 255) && (S2.f32 / S1.f32 == DENORM.f32)) then
VCC.u64[laneId] = 1'1U; if S0.u32 == S1.u32 then D0.f32 = ldexp(S0.f32, -64) endif
elsif ((exponent(S1.f32) >= 253) && (exponent(S1.f32) < 255)) then D0.f32 = ldexp(S0.f32, -64)
elsif S2.f32 / S1.f32 == DENORM.f32 then
VCC.u64[laneId] = 1'1U; if S0.u32 == S2.u32 then D0.f32 = ldexp(S0.f32, 64) endif
elsif exponent(S2.f32) <= 23 then D0.f32 = ldexp(S0.f32, 64)
endif""",
    # the scale taken back is v_div_scale_f32's: 2 ** 64, of the denominator of large quotients, the numerator of small
    "v_div_fmas_f32": """
tmp = fma(64'F(S0.f32), 64'F(S1.f32), 64'F(S2.f32));
if VCC.u64[laneId] then D0.f32 = abs(tmp) >= 1.0 ? ldexp(tmp, 64) : ldexp(tmp, -64)
else D0.f32 = fma(S0.f32, S1.f32, S2.f32)
endif""",
    # as printed, too large a quotient is shown by a condition that cannot hold there; the compilers' steps give NaN
    "v_div_fixup_f32": published()["v_div_fixup_f32"].replace(
        "exponent(S1.f32) == 255", "exponent(S2.f32) - exponent(S1.f32) > 128").replace("OVERFLOW_F32", "INF.f32"),
    # the table, which the text leaves out, is the manual's list of results: a signed number of 4 bits over 16
    "v_cvt_off_f32_i4": "D0.f32 = (u32_to_f32(S0[3 : 0].u32) - (S0[3 : 3].u32 == 1U ? 16.0F : 0.0F)) / 16.0F",
    # the text sets a rounding mode for its two conversions, which have no mode here
    "v_cvt_pkrtz_f16_f32": published()["v_cvt_pkrtz_f16_f32"].replace("f32_to_f16", "toward_zero").replace(
        "prev_mode = ROUND_MODE;\nROUND_MODE = ROUND_TOWARD_ZERO;\n", "").replace("ROUND_MODE = prev_mode;\n", ""),
    # 2 ** S1 need be no fp32 number
    "v_ldexp_f32": "D0.f32 = ldexp(S0.f32, S1.i32)",
}
#: instructions of which the manual has no pseudo-code
PLAIN = dict.fromkeys(("v_accvgpr_read", "v_accvgpr_write", "v_accvgpr_mov_b32"), "D0.b32 = S0.b32")
