"""Which classes of transformers' and torch's have a formula that a kernel of ours knows, by name and forward, and of which instances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from kernelhub.integrations.forwards import digest

__all__ = ["FAMILIES", "FUSE_LOSS", "LOSS", "MARKED", "OTHER_FORWARD", "TORCH", "Family", "family_of"]

# A torch class is in every model of the process: this in an instance's `__dict__` says that `mark` was asked to name it.
MARKED = "_kernelhub_layer"
# A loss is a function, which a model of transformers' finds under this name in its `__dict__`, where there is one.
LOSS = "_loss_function"
FUSE_LOSS = "_kernelhub_fused_loss"  # in an instance's `__dict__`: `mark_fused_loss` was asked to name it
TORCH = "torch.nn.modules."
OTHER_FORWARD = "its forward is none that the kernel was compared with: another version's, or somebody put it there"


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
        kind: Any = type(activation)
        if not isinstance(activation, nn.Module) or kind.__name__ not in _GATES:
            shown = kind.__name__ if isinstance(activation, nn.Module) else repr(activation)
            return f"its {name} is {shown}; the kernel knows {', '.join(_GATES)}"
        found = family_of(kind)
        if found is None or kind.forward is not found[0].forward or not found[1].knows(kind):
            return (
                f"its {name} is a {kind.__name__} with another forward than the one of that name that the kernel knows"
            )
        return _calls_torch(activation) if kind.__name__ == "GELUActivation" else None

    return unfit


_GATES = ("GELUActivation", "GELUTanh", "NewGELUActivation", "SiLU", "SiLUActivation")


def _decoder_layer(module: nn.Module) -> str | None:
    """The norm that is one with the add before it is a Llama's."""
    norm = getattr(module, "post_attention_layernorm", None)
    found = family_of(type(norm)) if isinstance(norm, nn.Module) else None
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


def _nothing(_: nn.Module) -> str | None:
    return None


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


@dataclass(frozen=True)
class Family:
    """Classes whose forward one layer of ours computes; `unfit` says of an instance why the kernel cannot read it.

    `forwards` are the digests of those forwards; none where the kernel itself asks a class what it computes.
    `calls_children`: its kernel reads no weights, and calls each child as a module: hooks and adapters run.
    """

    layer: str
    names: str
    unfit: Callable[[nn.Module], str | None] = _nothing
    package: str = "transformers."
    calls_children: bool = False
    forwards: str = ""

    def knows(self, cls: type[nn.Module]) -> bool:
        """Whether what the class computes is one of this family's forwards, and not only of a name that is in it."""
        return not self.forwards or digest(cls) in self.forwards.split()

    def condition(self, module: nn.Module) -> bool:
        """Whether a kernel may stand in for this instance: it can be read, and for a torch class `mark` named it."""
        named = self.package != TORCH or module.__dict__.get(MARKED) == self.layer
        return named and self.unfit(module) is None and self.knows(type(module))


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
        forwards="5fb94fa1780c6f5e 5edac47a9e7b8825",
    ),
    Family(
        "RMSNormCastLast",
        """
        AfmoeRMSNorm BeamRMSNorm DeepseekV4RMSNorm FlexOlmoRMSNorm FlintRMSNorm GptOssRMSNorm HeliumRMSNorm
        KyutaiSpeechToTextRMSNorm MoshiRMSNorm NemotronHRMSNorm NemotronH_Omni_RMSNorm Olmo2RMSNorm Olmo3RMSNorm
        OlmoHybridRMSNorm OpenAIPrivacyFilterRMSNorm
        """,
        _row_of_weights,
        forwards="fe34deb9a1b249a3 0b36ae1bf6e2463f 687c985291675a8f",
    ),
    Family(
        "RMSNormCastLast",
        """
        DiffusionGemmaRMSNorm EmbeddingGemma2RMSNorm Gemma3nRMSNorm Gemma4RMSNorm Gemma4UnifiedRMSNorm
        MuseGlimmerRMSNorm MuseSparkRMSNorm NeoMMERMSNorm
        """,
        _scaled,
        forwards="01466f9f6d738959",
    ),
    Family(
        "RMSNormZeroCentered",
        """
        Gemma2RMSNorm Gemma3RMSNorm GemmaRMSNorm MiniMaxM3VLRMSNorm MuseGlimmerTextCenteredRMSNorm
        Qwen3NextRMSNorm Qwen3_5MoeRMSNorm Qwen3_5RMSNorm RecurrentGemmaRMSNorm Step3p7RMSNorm T5Gemma2RMSNorm
        T5GemmaRMSNorm VaultGemmaRMSNorm
        """,
        _row_of_weights,
        forwards="c0a0b8e34b52e0fe",
    ),
    Family(
        "RMSNormWeightDtype",
        """
        IdeficsRMSNorm Kosmos2_5LayerNorm LongT5LayerNorm MT5LayerNorm Pix2StructLayerNorm Pop2PianoLayerNorm
        SwitchTransformersLayerNorm T5LayerNorm UMT5LayerNorm UdopLayerNorm
        """,
        _row_of_weights,
        forwards="856b7d36f87eb0cc",
    ),
    Family(
        "RMSNormGated",
        """
        OlmoHybridRMSNormGated Qwen3NextRMSNormGated Qwen3_5MoeRMSNormGated Qwen3_5RMSNormGated
        Qwen4ExpTextRMSNormGated
        """,
        _gated,
        forwards="a88390e0b17b5b8a",
    ),
    Family(
        "RMSNormGatedCastLast",
        "BailingHybridRMSNormGated Glm5NextTextRMSNormGated KimiLinearRMSNormGated",
        _gated,
        forwards="9745ddce21bca89e",
    ),
    Family(
        "RMSNormGateFirst",
        "BambaRMSNormGated GraniteMoeHybridRMSNormGated MambaRMSNormGated",
        _row_of_weights,
        forwards="60db511a2866b439",
    ),
    Family(
        "LayerNormCastLast",
        """
        Cohere2LayerNorm Cohere2MoeLayerNorm CohereCompassLayerNorm CohereLayerNorm
        """,
        _row_of_weights,
        forwards="ea3fe30d8448b6d4",
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
        forwards="9b6ca9a43b63caf6 f5957513a81304ee 9d905fd2633ca61e",
    ),
    Family(
        "PackedGatedMLP",
        """
        DiaMLP EsmFold2SwiGLU Glm4MLP Glm4vTextMLP GlmImageTextMLP GlmMLP GlmOcrTextMLP Phi3MLP
        Phi4MultimodalMLP
        """,
        _gated_mlp("activation_fn"),
        forwards="584c117e5aa6a9c0",
    ),
    Family(
        "GatedFeedForward",
        """
        Kosmos2_5VisionMlp MT5DenseGatedActDense Pix2StructTextDenseGatedActDense Pix2StructVisionMlp
        Pop2PianoDenseGatedActDense T5DenseGatedActDense UMT5DenseGatedActDense UdopDenseGatedActDense
        """,
        _gated_mlp("act"),
        forwards="51ce481e4220eab7",
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
        forwards="7874b471dc70c74a 5443523012c2c491",
    ),
    Family(
        "WindowedRotaryAttention",
        """
        CwmAttention DeepseekOcr2VisionAttention MiniMaxAttention MinistralAttention MistralAttention
        MixtralAttention Qwen2Attention VoxtralRealtimeAttention VoxtralRealtimeTextAttention
        """,
        forwards="3b8e5e14938e4158 df2b3fee9f00b97a",
    ),
    Family(
        "NormedRotaryAttention",
        """
        Dots1Attention MellumAttention Qwen3Attention Qwen3MoeAttention Qwen3OmniMoeCode2WavAttention
        Qwen3OmniMoeTalkerCodePredictorAttention Qwen3OmniMoeThinkerTextAttention
        """,
        forwards="e061e17168ee6b01",
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
        forwards="b03e84c101e6a84a",
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
        forwards="fdd70ef053b5f056 c2ee79c3938bce7a 33a42ee6b39dc3bc 7306f3413e569c70 15e2c1e04b54a507",
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
    Family("SiLU", "SiLUActivation", forwards="ae44248d59492585"),
    Family("GeLU", "GELUActivation", _calls_torch, forwards="e8bc5e58801ca6ce"),
    Family("GeluTanh", "GELUTanh", forwards="e8bc5e58801ca6ce"),
    Family("NewGELU", "NewGELUActivation AccurateGELUActivation", forwards="8731a54de0ffa00a a2fa43a69effc080"),
    Family("FastGELU", "FastGELUActivation", forwards="b78e27f82cc2c3bd"),
    Family("QuickGELU", "QuickGELUActivation", forwards="4867b5aec6f13181"),
    Family("Mish", "MishActivation", forwards="e8bc5e58801ca6ce"),
    Family("ReLUSquared", "ReLUSquaredActivation", forwards="febc0d51c1dc23a1"),
    Family("LayerNorm", "LayerNorm", _layer_norm, TORCH, forwards="98e969eaedf807bd"),
    Family("SiLU", "SiLU", _out_of_place, TORCH, forwards="ddae0dac5c4663bf"),
    Family("TorchGELU", "GELU", _torch_gelu, TORCH, forwards="b4fb9f8b78d0b648"),
    Family("Mish", "Mish", _out_of_place, TORCH, forwards="bf0fd230001c04cd"),
    Family("Tanh", "Tanh", _nothing, TORCH, forwards="a81172dbfbfd32c2"),
)
_BY_NAME = {(family.package, name): family for family in FAMILIES for name in family.names.split()}
_PACKAGES = ("transformers.", TORCH)


def family_of(cls: type) -> tuple[type[nn.Module], Family] | None:
    """The class in the table that `cls` is or comes from (FSDP and others put a class of their own in between)."""
    for base in cls.__mro__:
        package = next((prefix for prefix in _PACKAGES if base.__module__.startswith(prefix)), "")
        family = _BY_NAME.get((package, base.__name__))
        if family is not None:
            return base, family
    return None
