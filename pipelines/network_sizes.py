"""How large the networks, samples and conditions of a run are, from headers and configurations."""

from dataclasses import dataclass
from math import prod
from typing import Any

from dmd_core.families import folder_geometry, part_config
from dmd_core.pass_memory import condition_bytes, head_parameters, without_memory
from pipelines.config import PairsSection
from pipelines.train_config import TrainSection
from pipelines.weights import Weights, denoiser_of

FLOAT, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class NetworkSizes:
    """Parameters: `denoiser` of the network that is distilled (and copied twice), `others` of VAE
    and text encoders, `adapters` of the LoRA that the recipe asks for, `block` of the largest
    block that is sharded as a whole, `head` of the discriminator (0: no stage has one). Of those of
    the denoiser and of the text encoders, `matrices` and `encoder_matrices` are in the dtype that
    they are used in where nothing trains them (`dmd_core.precision.hold`).

    Bytes in float32: `sample` of one sample, `condition` of what the network is told of it.
    `picture`: its height and width in pixels; `decoded`: is a VAE between the two?
    """

    denoiser: int
    others: int
    adapters: int
    block: int
    head: int = 0
    matrices: int = 0
    encoder_matrices: int = 0
    sample: int = 0
    condition: int = 0
    picture: tuple[int, int] = (0, 0)
    decoded: bool = True

    def frozen_denoiser(self, width: int) -> int:
        """Bytes of one that nothing trains; `width`: those of a number that it is used in."""
        return FLOAT * self.denoiser - (FLOAT - width) * self.matrices

    def frozen_others(self, width: int) -> int:
        """Bytes of text encoders and VAE, likewise."""
        return FLOAT * self.others - (FLOAT - width) * self.encoder_matrices

    @staticmethod
    def of(
        folder: str, weights: list[Weights], section: TrainSection, pairs: PairsSection
    ) -> "NetworkSizes":
        """`folder`: the teacher's, of which `weights` are. Raises ValueError for a size in `pairs`
        that its samples cannot have."""
        denoiser = denoiser_of(weights)
        others = [part for part in weights if part is not denoiser]
        config, geometry = part_config(folder, denoiser.part), folder_geometry(folder)
        shape = geometry.shape(pairs.height, pairs.width)
        head, condition = _head_and_condition(config, shape, judged=section.uses_gan)
        return NetworkSizes(
            denoiser=denoiser.parameters,
            others=sum(part.parameters for part in others),
            adapters=denoiser.adapters(section.lora_rank, section.lora_targets),
            block=max(_blocks(denoiser).values()),
            head=head,
            matrices=denoiser.matrices,
            encoder_matrices=sum(
                part.matrices for part in others if part.part.startswith("text_encoder")
            ),
            sample=FLOAT * prod(shape),
            condition=condition,
            picture=geometry.pixels(shape),
            decoded=any(part.part == "vae" for part in others),
        )


def _head_and_condition(
    config: dict[str, Any], shape: tuple[int, ...], *, judged: bool
) -> tuple[int, int]:
    """(parameters of the discriminator's head, bytes of a condition). 0 of what this version does
    not know: such a network cannot be trained, and the training says so by name."""
    try:
        network = without_memory(config["_class_name"], config)
        return head_parameters(network, shape) if judged else 0, condition_bytes(network)
    except ValueError:
        return 0, 0


def _blocks(denoiser: Weights) -> dict[str, int]:
    """Parameters of each part that is sharded as a whole: entries of lists, the rest by name."""
    found: dict[str, int] = {}
    one = {name: Weights("", {name: shape}) for name, shape in denoiser.shapes.items()}
    for name, weight in one.items():
        first, *rest = name.split(".")
        key = f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
        found[key] = found.get(key, 0) + weight.parameters
    return found
