"""transformers' models: naming the layers that no decorator names, and the kernels of our own for them.

transformers' decorators name layers only where a package called `kernels` is installed, and never torch's own layers
(`nn.LayerNorm`, `nn.GELU`) inside models. `mark` names both, from one table of class names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kernelhub.integrations.rotary import FUNCTION, mark_rotary
from kernelhub.layers.kernelize import kernelize
from kernelhub.layers.mapping import KernelMapping, use_kernel_mapping
from kernelhub.layers.markers import mark_as_calling, replace_kernel_forward_from_hub
from kernelhub.layers.mode import Mode
from kernelhub.layers.report import kernel_report, note
from kernelhub.layers.repositories import LayerRepository
from kernelhub.layers.survey import uncompiled

__all__ = ["Marks", "default_mapping", "kernelize_pretrained", "mark"]

# A torch class is in every model of the process: this in an instance's `__dict__` says that `mark` was asked to name it.
MARKED = "_kernelhub_layer"
TORCH = "torch.nn.modules."
DEVICES = ("cpu", "cuda", "rocm", "xpu", "mps")

NORM_LAYERS = (
    "LayerNorm",
    "LayerNormCastLast",
    "RMSNorm",
    "RMSNormCastLast",
    "RMSNormGateFirst",
    "RMSNormGated",
    "RMSNormGatedCastLast",
    "RMSNormWeightDtype",
    "RMSNormZeroCentered",
)
ACTIVATION_LAYERS = (
    "FastGELU",
    "GeGLUMLP",
    "GeLU",
    "GeluAndMul",
    "GeluTanh",
    "GeluTanhAndMul",
    "Mish",
    "NewGELU",
    "QuickGELU",
    "ReLUSquared",
    "SiLU",
    "SiluAndMul",
    "SwiGLUMLP",
    "Tanh",
    "TorchGELU",
)
# Those for single modules; `RMSNormGatedMLP` is for two.
DECODER_LAYERS = (
    "CausalDecoder",
    "DecoderLayer",
    "GatedFeedForward",
    "GatedMLP",
    "PackedGatedMLP",
    "RotaryAttention",
    "WindowedRotaryAttention",
)
ROTARY_LAYERS = ("rotary_pos_emb", "RotaryEmbedding", "RotaryEmbeddingByLayerType")
LOSS_LAYERS = ("ForCausalLMLoss",)

# By device, the layers that keep their forward under torch.compile, and in which of the two modes: those that inductor
# computes faster together with what stands around them. On an H200 it adds and norms in one pass, also before the sum, which
# loses less than the kernels save only for the zero-centred norm in inference (benchmarks/NOTES.md, "Compiled"). A layer can be
# left in both modes or in training: a kernel for training serves inference, too.
ALWAYS = (Mode.INFERENCE, Mode.TRAINING)
LEFT_TO_INDUCTOR: Mapping[str, Mapping[str, tuple[Mode, ...]]] = {
    "cuda": {
        "LayerNorm": ALWAYS,
        "RMSNorm": ALWAYS,
        "RMSNormZeroCentered": (Mode.TRAINING,),
        # Tables of cosines and sines, of which it makes one kernel by itself.
        "RotaryEmbedding": ALWAYS,
        "RotaryEmbeddingByLayerType": ALWAYS,
    }
}


# What a kernel reads of a module, and why it could not


def _row_of_weights(module: nn.Module) -> str | None:
    """A norm's `weight` has one dimension, and `variance_epsilon` or `eps` is a number."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return f"its weight is {_shape(weight)}; the kernel reads one of one dimension"
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, (int, float)):
        return f"its variance_epsilon or eps is {epsilon!r}; the kernel reads a number"
    return None


def _gated(module: nn.Module) -> str | None:
    activation = getattr(module, "activation", None)
    if activation not in ("silu", "swish", "sigmoid"):
        return f"its activation is {activation!r}; the kernel knows silu, swish and sigmoid"
    return _row_of_weights(module)


def _scaled(module: nn.Module) -> str | None:
    if getattr(module, "with_scale", None) is not True:
        return "it has no weight (with_scale), which the kernel reads"
    return _row_of_weights(module)


def _layer_norm(module: nn.Module) -> str | None:
    missing = [name for name in ("normalized_shape", "weight", "bias", "eps") if not hasattr(module, name)]
    return f"it has no {', '.join(missing)}, which the kernel reads" if missing else None


def _torch_gelu(module: nn.Module) -> str | None:
    known = getattr(module, "approximate", None) in ("none", "tanh")
    return None if known else "its approximate is neither none nor tanh"


def _gated_mlp(name: str) -> Callable[[nn.Module], str | None]:
    """A gated MLP, its activation under that name."""

    def unfit(module: nn.Module) -> str | None:
        activation = getattr(module, name, None)
        kind = type(activation).__name__
        if not isinstance(activation, nn.Module) or kind not in _GATES:
            shown = kind if isinstance(activation, nn.Module) else repr(activation)
            return f"its {name} is {shown}; the kernel knows {', '.join(_GATES)}"
        return _calls_torch(activation) if kind == "GELUActivation" else None

    return unfit


_GATES = ("GELUActivation", "GELUTanh", "NewGELUActivation", "SiLU", "SiLUActivation")


def _decoder_layer(module: nn.Module) -> str | None:
    """The norm that is one with the add before it is a Llama's."""
    norm = getattr(module, "post_attention_layernorm", None)
    found = _family(type(norm)) if isinstance(norm, nn.Module) else None
    if not isinstance(norm, nn.Module) or found is None or found[1].layer != "RMSNorm":
        return f"its post_attention_layernorm is {type(norm).__name__}; the kernel knows the RMS norm of Llama"
    return _row_of_weights(norm)


def _calls_torch(module: nn.Module) -> str | None:
    # Written out in Python it rounds at other places, and closer than torch's own does in float32.
    return None if getattr(module, "act", None) is F.gelu else "it was asked for the formula in Python"


def _out_of_place(module: nn.Module) -> str | None:
    return "it writes to its input (inplace)" if getattr(module, "inplace", False) else None


def _rotary_tables(module: nn.Module) -> str | None:
    """Its frequencies, or those of one of its kinds of layers, stay as they are, whatever the positions."""
    rope_type = getattr(module, "rope_type", None)
    types = list(rope_type.values()) if isinstance(rope_type, Mapping) else [rope_type]
    if any(isinstance(one, str) and "dynamic" not in one and one != "longrope" for one in types):
        return None
    return f"its rope_type is {rope_type!r}; the kernel knows those whose frequencies do not change with the positions"


def _nothing(module: nn.Module) -> str | None:  # noqa: ARG001 - checks get it
    return None


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@dataclass(frozen=True)
class Family:
    """Classes whose forward one layer of ours computes; `unfit` says of an instance why the kernel cannot read it.

    `calls_children`: its kernel reads no weights, and calls each child as a module: hooks and adapters run.
    """

    layer: str
    names: str
    unfit: Callable[[nn.Module], str | None] = _nothing
    package: str = "transformers."
    calls_children: bool = False

    def condition(self, module: nn.Module) -> bool:
        """Whether a kernel may stand in for this instance: it can be read, and for a torch class `mark` named it."""
        named = self.package != TORCH or module.__dict__.get(MARKED) == self.layer
        return named and self.unfit(module) is None


# By class name: transformers has one class per architecture and formula. A test holds each to its family's formula.
FAMILIES = (
    Family(
        "RMSNorm",
        """
        AXK1RMSNorm AXK2RMSNorm Aimv2RMSNorm ApertusRMSNorm ArceeRMSNorm AriaTextRMSNorm BailingHybridRMSNorm
        BambaRMSNorm BitNetRMSNorm BltRMSNorm ChameleonRMSNorm ClvpRMSNorm Cohere2MoeRMSNorm
        Cosmos3EdgeTextRMSNorm CsmRMSNorm CwmRMSNorm DeepseekOcr2TextRMSNorm DeepseekOcr2VisionRMSNorm
        DeepseekV2RMSNorm DeepseekV32RMSNorm DeepseekV3RMSNorm Deimv2RMSNorm DiaRMSNorm DiffLlamaRMSNorm
        DogeRMSNorm Dots1RMSNorm Emu3RMSNorm Ernie4_5RMSNorm Ernie4_5_MoeRMSNorm Ernie4_5_VLMoeRMSNorm
        EuroBertRMSNorm EvollaRMSNorm Exaone4RMSNorm Exaone4_5_RMSNorm ExaoneMoeRMSNorm FalconH1RMSNorm
        FalconMambaRMSNorm Glm4MoeLiteRMSNorm Glm4MoeRMSNorm Glm4RMSNorm Glm4vMoeRMSNorm Glm4vMoeTextRMSNorm
        Glm4vRMSNorm Glm5NextRMSNorm Glm5NextTextRMSNorm GlmImageRMSNorm GlmMoeDsaRMSNorm GlmOcrRMSNorm
        GlmRMSNorm Granite4VisionTextRMSNorm GraniteMoeHybridRMSNorm GraniteMoeRMSNorm GraniteMoeSWARMSNorm
        GraniteMoeSharedRMSNorm GraniteRMSNorm GraniteSWARMSNorm HYV3RMSNorm HYV4RMSNorm HiggsAudioV2RMSNorm
        HunYuanDenseV1RMSNorm HunYuanMoEV1RMSNorm HunYuanVLRMSNorm HyperCLOVAXRMSNorm Idefics2RMSNorm
        Idefics3RMSNorm InklingRMSNorm InternVLVisionRMSNorm JambaRMSNorm JetMoeRMSNorm KimiLinearRMSNorm
        Kolibri1RMSNorm LagunaRMSNorm Lfm2MoeRMSNorm Lfm2RMSNorm LightOnOcrRMSNorm LlamaRMSNorm
        LongcatFlashRMSNorm Mamba2RMSNorm MambaRMSNorm MellumRMSNorm MiMoV2FlashRMSNorm MiniCPM3RMSNorm
        MiniMaxM2RMSNorm MiniMaxRMSNorm Ministral3RMSNorm MinistralRMSNorm Mistral3RMSNorm Mistral4RMSNorm
        MistralLarge4RMSNorm MistralRMSNorm MixtralRMSNorm MllamaTextRMSNorm Molmo2RMSNorm
        MuseGlimmerAssistantRMSNorm NeuCodecRMSNorm OlmoeRMSNorm Ovis2RMSNorm PaddleOCRRMSNorm
        PeAudioEncoderRMSNorm PeAudioVideoEncoderRMSNorm PeVideoEncoderRMSNorm Phi3RMSNorm Phi4MultimodalRMSNorm
        PixtralRMSNorm QianfanOCRVisionRMSNorm Qwen2MoeRMSNorm Qwen2RMSNorm Qwen2VLRMSNorm Qwen2_5OmniRMSNorm
        Qwen2_5_VLRMSNorm Qwen3MoeRMSNorm Qwen3OmniMoeCode2WavRMSNorm Qwen3OmniMoeRMSNorm
        Qwen3OmniMoeTextRMSNorm Qwen3OmniMoeThinkerTextRMSNorm Qwen3RMSNorm Qwen3VLMoeTextRMSNorm
        Qwen3VLTextRMSNorm Sapiens2RMSNorm SeedOssRMSNorm SmolLM3RMSNorm SolarOpenRMSNorm TimesFm2_5RMSNorm
        TimesFmRMSNorm UltraVBertRMSNorm UltrabertRMSNorm UnlimitedOcrTextRMSNorm
        VibeVoiceAcousticTokenizerRMSNorm VibeVoiceAsrRMSNorm VibeVoiceRMSNorm VoxtralRealtimeRMSNorm
        Xcodec2RMSNorm YoutuRMSNorm Zamba2RMSNorm ZambaRMSNorm ZayaRMSNorm
        Llama4TextRMSNorm
        """,
        _row_of_weights,
    ),
    Family(
        "RMSNormCastLast",
        """
        AfmoeRMSNorm BeamRMSNorm DeepseekV4RMSNorm FlexOlmoRMSNorm FlintRMSNorm GptOssRMSNorm HeliumRMSNorm
        KyutaiSpeechToTextRMSNorm MoshiRMSNorm NemotronHRMSNorm NemotronH_Omni_RMSNorm Olmo2RMSNorm Olmo3RMSNorm
        OlmoHybridRMSNorm OpenAIPrivacyFilterRMSNorm
        """,
        _row_of_weights,
    ),
    Family(
        "RMSNormCastLast",
        """
        DiffusionGemmaRMSNorm EmbeddingGemma2RMSNorm Gemma3nRMSNorm Gemma4RMSNorm Gemma4UnifiedRMSNorm
        MuseGlimmerRMSNorm MuseSparkRMSNorm NeoMMERMSNorm
        """,
        _scaled,
    ),
    Family(
        "RMSNormZeroCentered",
        """
        Gemma2RMSNorm Gemma3RMSNorm GemmaRMSNorm MiniMaxM3VLRMSNorm MuseGlimmerTextCenteredRMSNorm
        Qwen3NextRMSNorm Qwen3_5MoeRMSNorm Qwen3_5RMSNorm RecurrentGemmaRMSNorm Step3p7RMSNorm T5Gemma2RMSNorm
        T5GemmaRMSNorm VaultGemmaRMSNorm
        """,
        _row_of_weights,
    ),
    Family(
        "RMSNormWeightDtype",
        """
        IdeficsRMSNorm Kosmos2_5LayerNorm LongT5LayerNorm MT5LayerNorm Pix2StructLayerNorm Pop2PianoLayerNorm
        SwitchTransformersLayerNorm T5LayerNorm UMT5LayerNorm UdopLayerNorm
        """,
        _row_of_weights,
    ),
    Family(
        "RMSNormGated",
        """
        OlmoHybridRMSNormGated Qwen3NextRMSNormGated Qwen3_5MoeRMSNormGated Qwen3_5RMSNormGated
        Qwen4ExpTextRMSNormGated
        """,
        _gated,
    ),
    Family(
        "RMSNormGatedCastLast",
        "BailingHybridRMSNormGated Glm5NextTextRMSNormGated KimiLinearRMSNormGated",
        _gated,
    ),
    Family(
        "RMSNormGateFirst",
        "BambaRMSNormGated GraniteMoeHybridRMSNormGated MambaRMSNormGated",
        _row_of_weights,
    ),
    Family(
        "LayerNormCastLast",
        """
        Cohere2LayerNorm Cohere2MoeLayerNorm CohereCompassLayerNorm CohereLayerNorm
        """,
        _row_of_weights,
    ),
    Family(
        "GatedMLP",
        """
        AXK1MLP AXK2MLP AfmoeMLP Aimv2MLP AriaSharedExpertsMLP BailingHybridMLP BambaMLP BltMLP ChameleonMLP
        Cohere2MLP Cohere2MoeMLP CohereCompassMLP CohereMLP CsmMLP CwmMLP DINOv3ViTGatedMLP
        DeepseekOcr2TextMLP DeepseekOcr2VisionMLP DeepseekV2MLP DeepseekV32MLP DeepseekV3MLP Deimv2SwiGLUFFN
        DiffLlamaMLP DiffusionGemmaText4MLP Dinov2SwiGLUFFN Dinov2WithRegistersSwiGLUFFN DogeMLP Dots1MLP
        EmbeddingGemma2MLP Emu3MLP EomtDinov3GatedMLP EomtSwiGLUFFN Ernie4_5MLP Ernie4_5_MoeMLP
        Ernie4_5_VLMoeMLP EsmcMLP EuroBertMLP EvollaMLP Exaone4MLP Exaone4_5_MLP ExaoneMoeMLP FlexOlmoMLP
        FlintMLP Gemma2MLP Gemma3MLP Gemma4TextMLP Gemma4UnifiedTextMLP Gemma4VisionMLP GemmaMLP
        Glm4MoeLiteMLP Glm4MoeMLP Glm4VisionMlp Glm4vMoeTextMLP Glm4vMoeisionMlp GlmMoeDsaMLP GlmOcrVisionMlp
        Granite4VisionTextMLP GraniteMLP GraniteSWAMLP HYV3MLP HYV4MLP HeliumMLP HiggsAudioV2MLP HrmTextMLP
        HunYuanDenseV1MLP HunYuanMoEV1MLP HunYuanVLMLP HyperCLOVAXMLP Idefics2MLP IdeficsMLP JambaMLP
        KimiLinearMLP Kolibri1MLP LagunaMLP LlamaMLP LongcatFlashMLP MellumMLP MiMoV2FlashMLP MiniCPM3MLP
        Ministral3MLP MinistralMLP Mistral4MLP MistralLarge4TextMLP MistralMLP MllamaTextMLP
        Molmo2ImageProjectorMLP Molmo2MLP MoonshinMoonshineStreamingDecoderMLP MuseGlimmerAssistantMLP
        MuseGlimmerTextMLP MuseSparkTextMLP NomicBertMLP Olmo2MLP Olmo3MLP OlmoHybridMLP OlmoMLP OlmoeMLP
        Ovis2MLP Ovis2VisionMLP PaddleOCRMLP PeAudioEncoderMLP PeAudioVideoEncoderMLP PeVideoEncoderMLP
        PixtralMLP Qwen2MLP Qwen2MoeMLP Qwen2_5OmniMLP Qwen2_5_VLMLP Qwen3MLP Qwen3MoeMLP Qwen3NextMLP
        Qwen3OmniMoeCode2WavMlp Qwen3OmniMoeMLP Qwen3OmniMoeTalkerTextMLP Qwen3OmniMoeThinkerTextMLP
        Qwen3VLMoeTextMLP Qwen3VLTextMLP Qwen3_5MLP Qwen3_5MoeMLP Qwen4ExpTextMLP RadioSwiGLUFFN
        RfDetrDinov2SwiGLUFFN Sapiens2GatedMLP SmolLM3MLP SolarOpenMLP StableLmMLP Tipsv2VisionSwiGLUFFN
        UltrabertMLP UnlimitedOcrTextMLP VaultGemmaMLP VibeVoiceMLP VideomtGatedMLP VideomtSwiGLUFFN
        VoxtralRealtimeMLP VoxtralRealtimeTextMLP YoutuMLP ZambaMLP
        """,
        _gated_mlp("act_fn"),
    ),
    Family(
        "PackedGatedMLP",
        """
        DiaMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP Phi3MLP
        Phi4MultimodalMLP
        """,
        _gated_mlp("activation_fn"),
    ),
    Family(
        "GatedFeedForward",
        """
        Kosmos2_5VisionMlp MT5DenseGatedActDense Pix2StructTextDenseGatedActDense Pix2StructVisionMlp
        Pop2PianoDenseGatedActDense T5DenseGatedActDense UMT5DenseGatedActDense UdopDenseGatedActDense
        """,
        _gated_mlp("act"),
    ),
    Family(
        "RotaryAttention",
        """
        ArceeAttention AriaTextAttention BambaAttention Cosmos3EdgeTextAttention CsmAttention
        DeepseekOcr2TextAttention DiaSelfAttention Emu3Attention EuroBertAttention GemmaAttention
        GradiumPhononTTSAttention Granite4VisionTextAttention GraniteAttention GraniteMoeAttention
        GraniteMoeSharedAttention HiggsAudioV2Attention HyperCLOVAXAttention Jais2Attention LlamaAttention
        NemotronAttention PhimoeAttention PocketTTSAttention Qwen2MoeAttention SolarOpenAttention
        UnlimitedOcrTextAttention
        """,
    ),
    Family(
        "WindowedRotaryAttention",
        """
        CwmAttention DeepseekOcr2VisionAttention MiniMaxAttention MinistralAttention MistralAttention
        MixtralAttention Qwen2Attention VoxtralRealtimeAttention VoxtralRealtimeTextAttention
        """,
    ),
    Family(
        "DecoderLayer",
        """
        AXK1DecoderLayer AXK2DecoderLayer ArceeDecoderLayer AriaTextDecoderLayer BitNetDecoderLayer
        Cosmos3EdgeTextDecoderLayer CsmDecoderLayer CwmDecoderLayer DeepseekOcr2TextDecoderLayer
        DeepseekOcr2VisionEncoderLayer DeepseekV2DecoderLayer DeepseekV32DecoderLayer DeepseekV3DecoderLayer
        DiffLlamaDecoderLayer Dots1DecoderLayer Ernie4_5DecoderLayer Ernie4_5_MoeDecoderLayer
        EuroBertDecoderLayer ExaoneMoeDecoderLayer FlintDecoderLayer GemmaDecoderLayer Glm4MoeDecoderLayer
        Glm4MoeLiteDecoderLayer Glm4vMoeTextDecoderLayer GlmDecoderLayer GradiumPhononTTSDecoderLayer
        HYV3DecoderLayer HeliumDecoderLayer HrmTextDecoderLayer HunYuanDenseV1DecoderLayer
        HunYuanMoEV1DecoderLayer HunYuanVLDenseV1DecoderLayer Jais2DecoderLayer LagunaDecoderLayer
        LlamaDecoderLayer MellumDecoderLayer MiMoV2FlashDecoderLayer Ministral3DecoderLayer
        MinistralDecoderLayer Mistral4DecoderLayer MistralDecoderLayer MoonshineEncoderLayer
        MoonshineStreamingEncoderLayer NanoChatDecoderLayer NeuCodecDecoderLayer OlmoDecoderLayer
        OlmoeDecoderLayer PaddleOCRDecoderLayer PeAudioEncoderLayer PeAudioVideoEncoderLayer
        PeVideoEncoderLayer PocketTTSDecoderLayer Qwen2DecoderLayer Qwen2MoeDecoderLayer Qwen2VLDecoderLayer
        Qwen2_5OmniDecoderLayer Qwen2_5_VLDecoderLayer Qwen3DecoderLayer Qwen3MoeDecoderLayer
        Qwen3OmniMoeTalkerCodePredictorDecoderLayer Qwen3OmniMoeTalkerDecoderLayer
        Qwen3OmniMoeThinkerTextDecoderLayer Qwen3VLMoeTextDecoderLayer SeedOssDecoderLayer SmolLM3DecoderLayer
        SolarOpenDecoderLayer Starcoder2DecoderLayer Step3p7DecoderLayer UltrabertDecoderLayer
        UnlimitedOcrTextDecoderLayer Xcodec2DecoderLayer YoutuDecoderLayer
        """,
        _decoder_layer,
    ),
    Family(
        "CausalDecoder",
        """
        ApertusModel ArceeModel BitNetModel CohereModel CsmBackboneModel DiffLlamaModel Emu3TextModel
        Ernie4_5Model GemmaModel Glm4Model GlmModel HeliumModel HunYuanDenseV1Model Jais2Model LlamaModel
        MiniCPM3Model Ministral3Model MinistralModel MistralModel Olmo2Model OlmoModel Phi3Model Qwen2Model
        Qwen3Model SeedOssModel SmolLM3Model VoxtralRealtimeTextModel YoutuModel
        """,
        calls_children=True,
    ),
    Family(
        "RotaryEmbedding",
        """
        AXK1RotaryEmbedding AXK2RotaryEmbedding AfmoeRotaryEmbedding ApertusRotaryEmbedding ArceeRotaryEmbedding
        AriaTextRotaryEmbedding BailingHybridRotaryEmbedding BambaRotaryEmbedding BitNetRotaryEmbedding
        BltRotaryEmbedding ChameleonRotaryEmbedding Cohere2MoeRotaryEmbedding Cohere2RotaryEmbedding
        CohereRotaryEmbedding CsmRotaryEmbedding CwmRotaryEmbedding DbrxRotaryEmbedding
        DeepseekOcr2TextRotaryEmbedding DeepseekOcr2VisionRotaryEmbedding DeepseekV32RotaryEmbedding
        DeepseekV3RotaryEmbedding DiaRotaryEmbedding DiffLlamaRotaryEmbedding DogeRotaryEmbedding
        Dots1RotaryEmbedding Emu3RotaryEmbedding Ernie4_5RotaryEmbedding Ernie4_5_MoeRotaryEmbedding
        EsmcRotaryEmbedding EuroBertRotaryEmbedding EvollaRotaryEmbedding Exaone4RotaryEmbedding
        ExaoneMoeRotaryEmbedding FalconH1RotaryEmbedding FalconRotaryEmbedding FlexOlmoRotaryEmbedding
        FlintRotaryEmbedding GPTNeoXJapaneseRotaryEmbedding GPTNeoXRotaryEmbedding Gemma2RotaryEmbedding
        GemmaRotaryEmbedding Glm4MoeLiteRotaryEmbedding Glm4MoeRotaryEmbedding Glm4RotaryEmbedding
        GlmAsrRotaryEmbedding GlmMoeDsaRotaryEmbedding GlmRotaryEmbedding GptOssRotaryEmbedding
        GradiumPhononTTSRotaryEmbedding Granite4VisionTextRotaryEmbedding GraniteMoeHybridRotaryEmbedding
        GraniteMoeRotaryEmbedding GraniteMoeSWARotaryEmbedding GraniteMoeSharedRotaryEmbedding
        GraniteRotaryEmbedding GraniteSWARotaryEmbedding GteRotaryEmbedding HYV3RotaryEmbedding
        HYV4RotaryEmbedding HeliumRotaryEmbedding HiggsAudioV2RotaryEmbedding HrmTextRotaryEmbedding
        HunYuanDenseV1RotaryEmbedding HunYuanMoEV1RotaryEmbedding HyperCLOVAXRotaryEmbedding
        IdeficsRotaryEmbedding Jais2RotaryEmbedding JetMoeRotaryEmbedding JinaEmbeddingsV3RotaryEmbedding
        Kolibri1RotaryEmbedding KyutaiSpeechToTextRotaryEmbedding LasrEncoderRotaryEmbedding
        Lfm2MoeRotaryEmbedding Lfm2RotaryEmbedding LlamaRotaryEmbedding LongcatFlashRotaryEmbedding
        MimiRotaryEmbedding MiniCPM3RotaryEmbedding MiniMaxM2RotaryEmbedding MiniMaxM3VLRotaryEmbedding
        MiniMaxRotaryEmbedding Ministral3RotaryEmbedding MinistralRotaryEmbedding Mistral4RotaryEmbedding
        MistralRotaryEmbedding MixtralRotaryEmbedding MllamaRotaryEmbedding Molmo2RotaryEmbedding
        MoonshineRotaryEmbedding MoonshineStreamingRotaryEmbedding MoshiRotaryEmbedding
        MuseGlimmerAssistantRotaryEmbedding MuseGlimmerTextRotaryEmbedding MuseSparkTextRotaryEmbedding
        NanoChatRotaryEmbedding Nemotron3DiarizationRotaryEmbedding Nemotron3_5TranscribeRotaryEmbedding
        NemotronRotaryEmbedding NeuCodecRotaryEmbedding NomicBertRotaryEmbedding Olmo2RotaryEmbedding
        OlmoHybridRotaryEmbedding OlmoRotaryEmbedding OlmoeRotaryEmbedding OpenAIPrivacyFilterRotaryEmbedding
        PeAudioEncoderRotaryEmbedding PeAudioVideoEncoderRotaryEmbedding PeVideoEncoderRotaryEmbedding
        PersimmonRotaryEmbedding Phi3RotaryEmbedding Phi4MultimodalRotaryEmbedding PhiRotaryEmbedding
        PocketTTSAudioTokenizerRotaryEmbedding PocketTTSRotaryEmbedding Qwen2MoeRotaryEmbedding
        Qwen2RotaryEmbedding Qwen2_5OmniDiTRotaryEmbedding Qwen3MoeRotaryEmbedding Qwen3NextRotaryEmbedding
        Qwen3OmniMoeRotaryEmbedding Qwen3RotaryEmbedding RecurrentGemmaRotaryEmbedding SeedOssRotaryEmbedding
        SmolLM3RotaryEmbedding SolarOpenRotaryEmbedding StableLmRotaryEmbedding Starcoder2RotaryEmbedding
        T5GemmaRotaryEmbedding TimesFm2_5RotaryEmbedding UnlimitedOcrTextRotaryEmbedding
        VaultGemmaRotaryEmbedding VoxtralRealtimeRotaryEmbedding Xcodec2RotaryEmbedding YoutuRotaryEmbedding
        Zamba2RotaryEmbedding
        """,
        _rotary_tables,
    ),
    Family(
        "RotaryEmbeddingByLayerType",
        """
        BeamRotaryEmbedding DeepseekV4RotaryEmbedding DiffusionGemmaTextRotaryEmbedding
        EmbeddingGemma2RotaryEmbedding Gemma3RotaryEmbedding Gemma3nRotaryEmbedding Gemma4TextRotaryEmbedding
        Gemma4UnifiedTextRotaryEmbedding LagunaRotaryEmbedding MellumRotaryEmbedding MiMoV2FlashRotaryEmbedding
        ModernBertDecoderRotaryEmbedding ModernBertRotaryEmbedding Olmo3RotaryEmbedding Step3p7RotaryEmbedding
        T5Gemma2RotaryEmbedding UltrabertRotaryEmbedding ZayaRotaryEmbedding
        """,
        _rotary_tables,
    ),
    Family("SiLU", "SiLUActivation"),
    Family("GeLU", "GELUActivation", _calls_torch),
    Family("GeluTanh", "GELUTanh"),
    Family("NewGELU", "NewGELUActivation AccurateGELUActivation"),
    Family("FastGELU", "FastGELUActivation"),
    Family("QuickGELU", "QuickGELUActivation"),
    Family("Mish", "MishActivation"),
    Family("ReLUSquared", "ReLUSquaredActivation"),
    Family("LayerNorm", "LayerNorm", _layer_norm, TORCH),
    Family("SiLU", "SiLU", _out_of_place, TORCH),
    Family("TorchGELU", "GELU", _torch_gelu, TORCH),
    Family("Mish", "Mish", _out_of_place, TORCH),
    Family("Tanh", "Tanh", _nothing, TORCH),
)
_BY_NAME = {(family.package, name): family for family in FAMILIES for name in family.names.split()}
_PACKAGES = ("transformers.", TORCH)


@dataclass(frozen=True)
class Marks:
    """What `mark` found, by module path: the layers' names (also those that they had), and why other layers have none.

    `unreached` are functions (rotary embeddings) that no kernel can stand in for, by name, and why.
    """

    layers: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    unreached: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = {name: list(self.layers.values()).count(name) for name in sorted(set(self.layers.values()))}
        lines = [f"{count} x {name}" for name, count in counts.items()] or ["no layers"]
        lines += [f"{path} keeps its forward: {reason}" for path, reason in self.kept.items()]
        lines += [f"{name}: {reason}" for name, reason in self.unreached.items()]
        return "\n".join(lines)


def mark(model: nn.Module) -> Marks:
    """Name the layers of `model` for which there are kernels and which no decorator has named. Nothing else changes.

    A class of transformers' is named itself, as its decorator would do. A class of torch's is named too, but with a
    condition that holds only for the instances in models that `mark` was called on: those of other models keep their
    forward, whatever they are kernelized with. A subclass with a forward of its own is left alone, and so is a class
    that is named already. The loss of a causal language model, which is a function, is named on the model; see
    `kernelhub.integrations.losses`, also for the projection before it.

    Example: `mark(model)`, `with use_kernel_mapping(default_mapping()): kernelize(model, mode=Mode.INFERENCE)`.
    """
    marks = Marks()
    for path, module in uncompiled(model).named_modules():
        rotary = mark_rotary(module)
        if rotary == "":
            marks.layers[f"{path}.{ROTARY_LAYERS[0]}" if path else ROTARY_LAYERS[0]] = ROTARY_LAYERS[0]
        elif rotary is not None:
            marks.unreached[f"{type(module).forward.__module__}.{FUNCTION}"] = rotary
        if _marks_loss(module):
            marks.layers[f"{path}.{LOSS_LAYERS[0]}" if path else LOSS_LAYERS[0]] = LOSS_LAYERS[0]
        found = _family(type(module))
        if found is None:
            continue
        cls, family = found
        if getattr(type(module), "forward", None) is not cls.forward:
            marks.kept[path] = f"{type(module).__name__} has a forward of its own"
            continue
        if _named_by_others(cls, family):
            marks.layers[path] = vars(cls)["kernel_layer_name"]
            continue
        reason = family.unfit(module)
        if reason:
            marks.kept[path] = reason
            continue
        if family.package == TORCH:
            module.__dict__[MARKED] = family.layer
        replace_kernel_forward_from_hub(cls, family.layer, family.condition)
        if family.calls_children:
            mark_as_calling(cls)
        marks.layers[path] = family.layer
    note(model, _notes(marks))
    return marks


def default_mapping() -> KernelMapping:
    """The kernels that come with this package, for every layer that they have and every device that they run on.

    Under torch.compile those of `LEFT_TO_INDUCTOR` are not for the modes named there: the layers keep their forward.
    """
    return _mapping(LEFT_TO_INDUCTOR)


def _mapping(left: Mapping[str, Mapping[str, tuple[Mode, ...]]]) -> KernelMapping:
    """Each is registered for whatever nothing else serves; those of `left` for the modes that are not left."""
    return {
        layer: {
            device: _for_modes(
                LayerRepository(f"kernelhub/{kernel}", layer_name=layer, version=1), left.get(device, {}).get(layer, ())
            )
            for device in DEVICES
        }
        for kernel, layers in (
            ("norm", NORM_LAYERS),
            ("activation", ACTIVATION_LAYERS),
            ("decoder", DECODER_LAYERS),
            ("rotary", ROTARY_LAYERS),
            ("loss", LOSS_LAYERS),
        )
        for layer in layers
    }


def _for_modes(repository: LayerRepository, left: tuple[Mode, ...]) -> LayerRepository | dict[Mode, LayerRepository]:
    if not left:
        return repository
    compiled = (mode | Mode.TORCH_COMPILE for mode in ALWAYS if mode not in left)
    return dict.fromkeys((*ALWAYS, *compiled), repository)


def kernelize_pretrained(
    model: nn.Module, *, mode: Mode | None = None, fuse_loss: bool = False, **options: Any
) -> nn.Module:
    """Name the layers of a transformers model, and kernelize it with the kernels of this package; returns the same model.

    `mode` None is the model's training state. With `fuse_loss` a causal language model computes its loss without all of
    the logits, which its output then lacks in training with labels (see `kernelhub.integrations.losses`). The other
    options are those of `kernelize`. Kernels that are registered count too; for a layer, device and mode that both have,
    this package's. Raises what `kernelize` raises.

    Example: `kernelize_pretrained(AutoModelForCausalLM.from_pretrained(folder))`.
    """
    marks = mark(model)
    wanted = mode or (Mode.TRAINING if model.training else Mode.INFERENCE)
    # Where nothing is left, this package's kernels are for whatever nothing of the user's serves, like those of other layers.
    mapping, notes = _mapping(LEFT_TO_INDUCTOR if Mode.TORCH_COMPILE in wanted else {}), _notes(marks)
    if fuse_loss:
        from kernelhub.integrations.losses import fused_loss_mapping, mark_fused_loss

        notes += tuple(f"the loss is not fused: {reason}" for reason in mark_fused_loss(model).values())
        mapping = {**mapping, **fused_loss_mapping()}
    note(model, notes)
    with use_kernel_mapping(mapping):
        kernelize(model, mode=wanted, **options)
    if Mode.TORCH_COMPILE in wanted:
        note(model, (*notes, *_left(model)))
    return model


def _left(model: nn.Module) -> list[str]:
    """What the report says of the layers that were left to inductor: nothing else serves the mode."""
    reasons = {row.reason for row in kernel_report(model).rows}
    return [
        f"{layer} keeps its forward on {device}: compiled together with what stands around it, that is faster"
        for device, layers in LEFT_TO_INDUCTOR.items()
        for layer in layers
        if any(reason.startswith(f"no kernel for {layer} on {device} serves ") for reason in reasons)
    ]


def _notes(marks: Marks) -> tuple[str, ...]:
    return tuple(f"not reached: {name}: {reason}" for name, reason in marks.unreached.items())


def _marks_loss(module: nn.Module) -> bool:
    if "transformers.modeling_utils" not in sys.modules:
        return False
    from kernelhub.integrations.losses import mark_loss  # which imports transformers

    return mark_loss(module)


def _family(cls: type) -> tuple[type[nn.Module], Family] | None:
    """The class in the table that `cls` is or comes from (FSDP and others put a class of their own in between)."""
    for base in cls.__mro__:
        package = next((prefix for prefix in _PACKAGES if base.__module__.startswith(prefix)), "")
        family = _BY_NAME.get((package, base.__name__))
        if family is not None:
            return base, family
    return None


def _named_by_others(cls: type[nn.Module], family: Family) -> bool:
    """Whether a decorator, or the user, has named the class."""
    condition = getattr(cls, "kernel_condition", None)
    return "kernel_layer_name" in vars(cls) and getattr(condition, "__self__", None) is not family
