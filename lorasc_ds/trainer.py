"""The live parts of a run: model, pairs, engine, cascade; a step, a score, what ships."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from lorasc_ds import models
from lorasc_ds.adapters import AdaptedWeight, backbone_parameters, other_matrices, parameter_groups
from lorasc_ds.algorithm.ledger import Adapter, Base, Ledger, LedgerError
from lorasc_ds.cascade import Boundaries
from lorasc_ds.classifier import ImageClassifier, SavedHead, make_rows
from lorasc_ds.encoded import EncodedExample
from lorasc_ds.errors import CheckpointError, ConfigError
from lorasc_ds.evaluation import check_images, check_layout, evaluate, evaluation_mode, for_the_loss_alone
from lorasc_ds.examples import ExampleMetrics
from lorasc_ds.generation import Generator
from lorasc_ds.image_reading import ImageReading
from lorasc_ds.in_flight import StepInFlight
from lorasc_ds.kernels.attention import SEQUENCES
from lorasc_ds.layer_compilation import compile_layers
from lorasc_ds.live_weights import LiveWeights
from lorasc_ds.objectives import probe_logits, summed_loss
from lorasc_ds.order import derived_seed
from lorasc_ds.prefetching import Ahead
from lorasc_ds.preparation import Preparation
from lorasc_ds.profiling import span
from lorasc_ds.scoring import Record, explaining_memory
from lorasc_ds.selection import Patience, Selection
from lorasc_ds.sharding import Launch, Processes, prepare_engine, start
from lorasc_ds.stopping import Stopping
from lorasc_ds.tasks import Scores
from lorasc_ds.text_reading import TextReading

PROBE_EXAMPLES = 4
PROBE_TOKENS = 256


def start_engine(launch: Launch, preparation: Preparation) -> Accelerator:
    """The process group and the engine of a run.

    Raises:
        ConfigError: the group has another size than the launcher says.
    """
    config = preparation.config
    return start(
        launch,
        micro_batch_size=preparation.data.micro_batch_size,
        accumulation=preparation.accumulation,
        max_grad_norm=config.training.max_grad_norm,
        timeout_seconds=config.training.ddp_timeout,
        # LLaVA's last vision layers are read by nothing; where there are no images, its whole tower
        skips_weights=models.kind_of(config.model, preparation.shape.config) == "image_text",
    )


class Trainer:
    """The live parts of a run and the verbs of the loop.

    Args:
        module: the pretrained model; its weights may already be cut up.
        weights: those of `module` that are adapted.
        stopping: asked at every step and between the batches of an evaluation.
        ledger_length: how many experts of the ledger in `directory` the run goes on from; None: it begins.

    Raises:
        ConfigError: the model lets a token see those after it, or is not the one that the run began with.
        CheckpointError: the ledger is damaged.
    """

    def __init__(
        self,
        preparation: Preparation,
        module: PreTrainedModel,
        weights: list[AdaptedWeight],
        accelerator: Accelerator,
        directory: Path,
        stopping: Stopping,
        ledger_length: int | None = None,
    ) -> None:
        self.preparation = preparation
        self.stopping = stopping
        self.module = module
        self.weights = weights
        config, data = preparation.config, preparation.data
        training = config.training
        self.processes = Processes(data.rank, data.world_size, accelerator.device)
        if training.gradient_checkpointing:
            module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if training.compile:
            compile_layers(module)
        if isinstance(preparation.reading, TextReading) and preparation.reading.layout.flat:
            module.set_attn_implementation(SEQUENCES)
        others = other_matrices(module, weights) if preparation.method.noise_on == "all" else {}
        network = preparation.reading.network(module)
        head = network.trained if isinstance(network, ImageClassifier) else {}
        groups = parameter_groups(weights, preparation.loraplus_lr_ratio, list(head.values()))
        self.learning_rates = {group["role"]: training.learning_rate * group["lr_ratio"] for group in groups}
        rate, decay, fused = training.learning_rate, training.weight_decay, fuses_adam(accelerator.device)
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=fused, foreach=not fused)
        self.engine, self.backend = prepare_engine(
            accelerator,
            self.processes,
            network,
            optimizer,
            [one.weight for one in weights],
            config.cascade.merge_path,
            training.ddp_timeout,
        )
        found = self.engine.learning_rates(training.learning_rate)
        if found != self.learning_rates:
            raise RuntimeError(f"the engine trains at {found}, but {self.learning_rates} were asked for")
        self.live = LiveWeights(
            weights,
            self.backend,
            self.processes,
            seed=training.seed,
            head=head,
            other_matrices=others,
            projects_gradients=config.adapter.method == "lora-fa" and config.adapter.lorafa_projection,
            accumulator=config.cascade.accumulator,
        )
        self.engine.model.train()
        if isinstance(network, ImageClassifier):
            make_rows(network, self.engine.model, lambda part, value: self.backend.write([head[part]], [value]))
        elif isinstance(preparation.reading, TextReading):
            models.refuse_bidirectional(config.model, module, self.logits)
            check_layout(self.engine.model, preparation.reading.layout, self.processes.device)
            if preparation.reading.layout.pixels is not None:
                check_images(
                    self.engine.model, preparation.reading.probe("train", 1, PROBE_TOKENS).to(self.processes.device)
                )
        self.base_sha256 = self.weights_sha256()
        self.base_checksum = self.live.checksum(backbone_parameters(module))
        self.batches = Ahead(data.step, preparation.plan.steps, preparation.reading.workers)
        self.selection = Selection(training.select, self.live)
        self.patience = Patience(training.early_stopping_patience)
        self.generator = self.make_generator()
        self.examples = ExampleMetrics()
        if ledger_length is None:
            ledger = self.new_ledger(getattr(module.config, "_commit_hash", None), directory / "ledger", tuple(others))
        else:
            ledger = self.old_ledger(directory / "ledger", ledger_length)
        models.name_classes(module, ledger.classes)
        self.cascade = Boundaries(
            self.live,
            ledger,
            preparation.method,
            probe=self.probe(),
            dev_loss=self.dev_loss,
            max_boundary_drift=config.cascade.max_boundary_drift,
            checks=config.cascade.check_boundaries,
        )

    def new_ledger(self, commit: str | None, directory: Path, noised: tuple[str, ...]) -> Ledger:
        """An empty ledger, written by the main process; `commit` is the hub's, where the model came from there."""
        preparation, config, reading = self.preparation, self.preparation.config, self.preparation.reading
        ledger = Ledger(
            directory=directory,
            strategy=config.cascade.strategy,
            base=Base(config.model.name_or_path, commit or config.model.revision, config.model.dtype, self.base_sha256),
            adapter=Adapter(config.adapter.method, config.adapter.rank, self.weights[0].scaling),
            seed=config.training.seed,
            slow_retention=preparation.asked("slow_retention"),
            noise_intensity=preparation.asked("noise_intensity"),
            weights=tuple(one.name for one in self.weights),
            noised=noised,
            classes=reading.outputs if isinstance(reading, ImageReading) else (),
        )
        if self.processes.main:
            ledger.save()
        return ledger

    def old_ledger(self, directory: Path, experts: int) -> Ledger:
        """The first `experts` experts of the run's ledger."""
        try:
            ledger = Ledger.load(directory, experts)
        except LedgerError as error:
            raise CheckpointError(str(error)) from error
        if ledger.base.sha256 != self.base_sha256:
            raise ConfigError(
                f"model.name_or_path {self.preparation.config.model.name_or_path}: the adapted weights have sha256"
                f" {self.base_sha256}, but the run began with {ledger.base.sha256}: give the model and revision it"
                f" began with ({ledger.base.revision}), or take another --output_dir"
            )
        return ledger

    def make_generator(self) -> Generator | None:
        preparation = self.preparation
        if preparation.task.generation is None:
            return None
        assert isinstance(preparation.reading, TextReading)
        return Generator(
            self.module,
            preparation.reading.tokenizer,
            preparation.task.generation,
            layout=preparation.reading.layout,
            synced=self.engine.zero_stage == 3,
            seed=preparation.config.training.seed,
        )

    def logits(self, ids: Tensor) -> Tensor:
        """Of token ids (inputs, length), in evaluation mode: (inputs, length, vocabulary)."""
        with evaluation_mode(self.engine.model):
            return self.engine.model(input_ids=ids.to(self.processes.device), use_cache=False).logits

    def probe(self) -> Callable[[], Tensor]:
        """Logits of a few training examples in evaluation mode, float32, of texts at most `PROBE_TOKENS` of them."""
        batch = self.preparation.reading.probe("train", PROBE_EXAMPLES, PROBE_TOKENS).to(self.processes.device)

        @span("probe")
        def logits() -> Tensor:
            with evaluation_mode(self.engine.model):
                return probe_logits(self.engine.model, batch)

        return logits

    def evaluate(self) -> Scores:
        """On every split but `train`; what every example scored is in `examples` until the next call."""
        self.examples = ExampleMetrics()
        splits = {split: examples for split, examples in self.preparation.splits.items() if split != "train"}
        return self.scores(splits, record=self.examples.add)

    @span("evaluation")
    def scores(
        self,
        splits: Mapping[str, Sequence[EncodedExample]],
        answers: bool = True,
        record: Callable[[str, Any, Record], None] | None = None,
    ) -> Scores:
        """
        Args:
            answers: whether they are generated, where the task asks for it; else the loss is all.
            record: as in `evaluate`.
        """
        return evaluate(
            self.engine.model,
            self.preparation.task,
            splits,
            batch_size=self.preparation.config.training.eval_batch_size,
            layout=self.preparation.reading.layout,
            processes=self.processes,
            poll=lambda: self.stopping.poll(self.processes),
            generator=self.generator if answers else None,
            record=record,
        )

    def dev_loss(self) -> float:
        """Of the model as it is, on the dev examples that a boundary chooses α and λ by."""
        preparation = self.preparation
        chosen = for_the_loss_alone(preparation.splits["dev"][: preparation.auto_examples], preparation.task)
        return self.scores({"dev": chosen}, answers=False)["dev"]["loss"]

    def weights_sha256(self) -> str:
        return self.live.weights_sha256()

    @span("step")
    def training_step(self, step: int, learning_rate: float) -> StepInFlight:
        """One optimizer step on its global batch; not taken where the loss or the gradient is not finite.

        The device is given its work, and not waited for.
        """
        began = time.perf_counter()
        training = self.preparation.config.training
        batch = self.batches(step)
        # loss, tokens, asked to stop, examples that could not be read
        totals = torch.zeros(4, dtype=torch.float64, device=self.processes.device)
        for number, micro in enumerate(batch.micro_batches, start=1):
            seed_dropout(derived_seed(training.seed, step, micro.first), self.processes.device)
            lower = f"lower training.micro_batch_size{micro.batch.also_lower}, set training.gradient_checkpointing"
            with (
                self.engine.micro_step(last=number == len(batch.micro_batches)),
                explaining_memory(micro.batch.size, f"step {step + 1}: a micro batch ran", lower),
            ):
                with span("forward"):
                    moved = micro.batch.to(self.processes.device)
                    loss = summed_loss(self.engine.model, moved, self.preparation.task.loss)
                    loss = loss * micro.counts / batch.normaliser
                # A loss that is not finite makes the gradient so, which every engine looks at; else this is times 1.
                with span("backward"):
                    self.engine.backward(loss * (1 + 0 * loss))
            totals[0] += loss.detach()
            totals[1] += micro.batch.input_tokens * micro.counts
        unreadable = [line for micro in batch.micro_batches if micro.counts for line in micro.batch.unreadable]
        totals[2], totals[3] = float(self.stopping.asked()), len(unreadable)
        self.processes.sum(totals)
        with span("update"):
            norm = self.engine.update(learning_rate, training.max_grad_norm)
        numbers = torch.cat([totals, norm.to(totals).reshape(1)])
        return StepInFlight(numbers, learning_rate, began, batch.ids, unreadable, self.processes)

    def beside(self) -> list[Any]:
        """What is saved with the model: tokenizer, processor, and a head that its files have no place for."""
        reading, head = self.preparation.reading, self.live.head()
        if isinstance(reading, ImageReading) and reading.head == "prototypes" and head:
            return [*reading.saved, SavedHead(head, reading.outputs)]
        return reading.saved

    def save(self, directory: Path, sha256: str) -> None:
        """Write the merged model, whose adapted weights have `sha256`; or a note, if not asked for."""
        if self.preparation.config.training.save_model:
            self.live.save(self.module, directory, self.beside(), sha256)
        elif self.processes.main:
            directory.mkdir(exist_ok=True)
            note = "training.save_model was false: the ledger and the base model give these weights.\n"
            (directory / "NOT_SAVED.txt").write_text(note)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed what is drawn on the device."""
    if device.type == "cpu":  # torch.manual_seed would queue it, with its stack, for accelerators that are not there
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def fuses_adam(device: torch.device) -> bool:
    """Whether torch's fused kernel gives an element the same bits wherever engines cut: not on a CPU."""
    return device.type == "cuda"


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
