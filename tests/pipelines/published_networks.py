"""The networks of the recipes as they are published: their configurations, and the memory of their
passes, which takes minutes to find (`test_memory_plan.py` does so with `-m slow`)."""

from dataclasses import dataclass
from math import prod
from typing import Any

from benchmarks.published import ARCHITECTURES
from dmd_core.pass_memory import PassMemory
from pipelines.network_sizes import FLOAT, NetworkSizes

# Text encoders: parameters, of which in matrices.
_CLIP_L, _CLIP_G = (123_060_480, 84_934_656), (694_659_840, 630_784_000)
_T5_XXL = (4_762_310_656, 4_630_511_616)
_VAE = 83_653_863


@dataclass(frozen=True)
class Published:
    """`encoders`: none has no VAE either. `shape` (C,h,w) and `picture` (height, width)
    are the recipe's; the rest is what this project finds for the configuration, `passes` with the
    recipe's precision and checkpointing."""

    name: str
    config: dict[str, Any]
    shape: tuple[int, ...]
    picture: tuple[int, int]
    encoders: tuple[tuple[int, int], ...]
    parameters: int
    matrices: int
    block: int
    head: int
    adapters: int
    condition: int
    passes: PassMemory

    def sizes(self, *, gan: bool) -> NetworkSizes:
        return NetworkSizes(
            denoiser=self.parameters,
            others=sum(count for count, _ in self.encoders) + (_VAE if self.encoders else 0),
            matrices=self.matrices,
            encoder_matrices=sum(matrices for _, matrices in self.encoders),
            adapters=self.adapters,
            block=self.block,
            head=self.head if gan else 0,
            sample=FLOAT * prod(self.shape),
            condition=self.condition,
            picture=self.picture,
            decoded=bool(self.encoders),
        )


_SD3 = {
    "sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}  # fmt: skip
_PIXART = {
    "sample_size": 64, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72,
    "num_attention_heads": 16, "cross_attention_dim": 1152, "caption_channels": 4096,
    "use_additional_conditions": False,
}  # fmt: skip
_PIXEL = {
    "sample_size": 32, "freq_shift": 1, "layers_per_block": 4, "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (256, 256, 256), "norm_num_groups": 32, "dropout": 0.13,
    "num_class_embeds": 10,
}  # fmt: skip
PUBLISHED = {
    "sd15": Published(
        "UNet2DConditionModel", ARCHITECTURES["sd15"].unet, (4, 64, 64), (512, 512), (_CLIP_L,),
        parameters=859_520_964, matrices=859_077_120, block=258_330_880, head=52_437_761,
        adapters=12_754_944, condition=236_544, passes=PassMemory(
            held=(374_989_826, 1_456_820_226), peak=(3_532_700_180, 4_454_590_996),
            frozen=(76_002_568, 546_051_136),
        ),
    ),
    "sdxl": Published(
        "UNet2DConditionModel", ARCHITECTURES["sdxl"].unet, (4, 128, 128), (1024, 1024),
        (_CLIP_L, _CLIP_G),
        parameters=2_567_463_684, matrices=2_565_880_320, block=1_206_568_960, head=104_874_241,
        adapters=92_897_280, condition=635_928, passes=PassMemory(
            held=(750_440_322, 4_861_939_714), peak=(10_505_307_412, 13_013_212_692),
            frozen=(166_055_200, 1_323_990_104),
        ),
    ),
    "sd3": Published(
        "SD3Transformer2DModel", _SD3, (16, 128, 128), (1024, 1024),
        (_CLIP_L, _CLIP_G, _T5_XXL),
        parameters=2_028_328_000, matrices=2_027_225_088, block=84_980_736, head=188_768_257,
        adapters=18_874_368, condition=5_464_064, passes=PassMemory(
            held=(386_852_354, 2_959_945_730), peak=(8_292_089_112, 10_680_273_316),
            frozen=(173_180_936, 1_347_199_040),
        ),
    ),
    "flux": Published(
        "FluxTransformer2DModel", {"guidance_embeds": True}, (16, 64, 64), (512, 512),
        (_CLIP_L, _T5_XXL),
        parameters=11_901_408_320, matrices=11_898_322_944, block=339_831_296, head=604_019_713,
        adapters=74_711_040, condition=8_391_684, passes=PassMemory(
            held=(660_664_834, 4_610_953_218), peak=(47_626_980_100, 49_284_598_020),
            frozen=(237_048_852, 1_297_849_476),
        ),
    ),
    "pixart": Published(
        "PixArtTransformer2DModel", _PIXART, (4, 64, 64), (512, 512), (_T5_XXL,),
        parameters=610_856_096, matrices=610_228_224, block=21_255_552, head=84_949_633,
        adapters=33_030_144, condition=4_916_400, passes=PassMemory(
            held=(167_503_538, 1_190_618_498), peak=(2_457_855_364, 3_047_948_292),
            frozen=(44_655_720, 294_445_680),
        ),
    ),
    "cifar10": Published(
        "UNet2DModel", _PIXEL, (3, 32, 32), (32, 32), (),
        parameters=59_023_619, matrices=58_930_688, block=12_734_720, head=2_098_945,
        adapters=1_310_720, condition=8, passes=PassMemory(
            held=(116_235_788, 968_683_532), peak=(245_735_452, 985_499_784),
            frozen=(12_605_464, 100_843_656),
        ),
    ),
}  # fmt: skip
PUBLISHED["cifar10-dmd2"] = PUBLISHED["cifar10"]
