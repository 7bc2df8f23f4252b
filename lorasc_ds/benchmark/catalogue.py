"""The rows of the benchmark: what each measures and where. No torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """
    Args:
        title: what is measured.
        function: MODULE:NAME in this package; called with a `Setting`, it gives results, perhaps of other rows too.
        needs_gpu: whether its number means something on a GPU only.
    """

    id: str
    title: str
    function: str
    needs_gpu: bool = False


ROWS = {
    row.id: row
    for row in (
        Row("S1", "a training step beside a plain PEFT loop", "steps:beside_peft"),
        Row("S2", "tokens a second on Alpaca's lengths beside HF Trainer and TRL", "steps:beside_trainers"),
        Row("S3", "a training step with compiled layers", "steps:compiled"),
        Row("C1", "a boundary beside PEFT's cycle", "boundaries:beside_peft"),
        Row("C2", "a boundary under ZeRO beside a new engine", "ranks:rows"),
        Row("C3", "merging a 4096 x 4096 weight: time and memory", "boundaries:large_merge"),
        Row("C4", "the noise's scale without forming the product", "counts:noise_scale"),
        Row("C5", "what ten bfloat16 merges keep", "counts:fidelity"),
        Row("C6", "the same bytes for any number of shards", "counts:shards"),
        Row("C7", "FLOPs of a step at the Llama-2-7B shape", "shapes:flops"),
        Row("C8", "activations kept for the backward pass at the Llama-2-7B shape", "shapes:activations"),
        Row("C9", "padding of real training sets", "data:padding"),
        Row("C10", "tokens read to score candidates", "data:prefixes"),
        Row("C11", "bytes of an expert beside a merged model's", "shapes:checkpoints"),
        Row("C12", "recompilations and live bytes over 5 boundaries", "boundaries:growth"),
        Row("Z1", "a training step under ZeRO beside DDP", "ranks:rows"),
        Row("Z2", "bytes communicated by a step and a boundary", "ranks:rows"),
        Row("G1", "tokens a second at the Llama-2-7B shape", "gpu_steps:throughput", True),
        Row("G2", "share of the matmul ceiling", "gpu_steps:throughput", True),
        Row("G3", "a step beside the model without pairs", "gpu_steps:pairs", True),
        Row("G4", "peak memory of a step", "gpu_steps:memory", True),
        Row("G5", "merge and noise of all q and v", "gpu_boundaries:kernels", True),
        Row("G6", "a whole boundary", "gpu_boundaries:whole", True),
        Row("G7", "the first step after a boundary", "gpu_boundaries:whole", True),
        Row("G8", "backends of attention", "gpu_steps:attention", True),
        Row("G9", "logits of labelled rows only", "gpu_steps:labelled", True),
        Row("G10", "images a second on CLIP ViT-bigG/14", "gpu_steps:images", True),
        Row("G11", "candidates scored with a shared beginning", "gpu_steps:candidates", True),
    )
}
