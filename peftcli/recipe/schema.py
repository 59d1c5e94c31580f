"""The recipe: the one home of every default, limit and description.

Keys use the names of TRL and PEFT where they mean the same.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from peftcli.errors import UsageError
from peftcli.methods import AnyMethod
from peftcli.methods.base import Conflict, Names, Section, refuse_conflicts
from peftcli.metrics import Metric, find_metric

Format = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "classification",
    "text",
]
Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "lion_32bit",
    "paged_lion_8bit",
    "sgd",
]
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


def _share(value: Any) -> Any:
    """`5%` -> 0.05; anything else is left for the field's own type to judge."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


def _as_mapping(key: str) -> BeforeValidator:
    """A plain string stands for a section that holds only `key`."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)


def _as_sources(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


def _as_eval(value: Any) -> Any:
    value = _share(value)
    if value is None or isinstance(value, float | int):
        return value
    return _as_sources(value)


Share = Annotated[float, BeforeValidator(_share)]


def _metric(name: str) -> Metric:
    try:
        return find_metric(name)
    except UsageError as error:
        raise ValueError(error.message) from None


class Model(Section):
    """The base model."""

    name: str = Field(min_length=1)
    """A hub id, a local folder, or `bundled:tiny`."""
    revision: str | None = None
    """A branch, tag or commit on the hub; the newest when absent."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Load and compute dtype; `auto` is bfloat16 where the device has it, else float32."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation; `auto` is the fastest that the model and device have."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models you have read."""


class Source(Section):
    """One place that rows come from."""

    path: str = Field(min_length=1)
    """A file, a folder, a glob, or a hub id."""
    split: str = "train"
    """The split of a hub data set."""
    subset: str | None = None
    """The configuration of a hub data set."""
    revision: str | None = None
    """A branch, tag or commit of a hub data set."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often the source is seen: 0.5 takes half of its rows, 2 takes each row twice."""
    limit: int | None = Field(None, ge=1)
    """Take at most this many rows of the source."""
    format: Format | None = None
    """The row format of this source; that of the data section when absent."""
    columns: dict[str, str] | None = None
    """Name in the format -> name in the file, for this source."""
    labels: Names | dict[str, str] | None = None
    """Label names for this source, by position or by value."""


Sources = Annotated[tuple[Source, ...], Strict(False), Field(min_length=1)]


class Data(Section):
    """Rows, and what is trained on in them."""

    train: Annotated[Sources, BeforeValidator(_as_sources)]
    """A file, folder, glob or hub id; or a list of them, each with weight, limit, split."""
    eval: Annotated[Share | Sources | None, BeforeValidator(_as_eval)] = 0.05
    """A share of the training rows (`5%`), a source like `train`, or `null` for none."""
    format: Format = "auto"
    """The row format; `auto` decides by content and says what it saw."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Name in the format -> name in the file, for instance `{prompt: question}`."""
    labels: Names | dict[str, str] | None = None
    """Names of the labels of a classification set, by position or by value."""
    system: str | None = None
    """A system message for rows that have none."""
    train_on: Literal["answers", "all", "last"] = "answers"
    """Which tokens carry loss: every assistant turn, every token, or the last turn only."""
    chat_template: str | None = None
    """A template's name, a .jinja file, or the tokenizer's own when absent."""
    max_length: int = Field(2048, ge=8)
    """The longest row in tokens."""
    too_long: Literal["auto", "error", "drop", "truncate", "split"] = "auto"
    """What happens to longer rows; `auto` splits plain text into pieces and truncates the rest."""
    bad_rows: Literal["error", "skip"] = "error"
    """Whether one row that cannot be read stops the run."""
    duplicates: Literal["keep", "drop"] = "keep"
    """What happens to rows that occur twice; they are counted either way."""
    overlap: Literal["drop", "allow", "error"] = "drop"
    """What happens to evaluation rows that are training rows too."""
    limit: int | None = Field(None, ge=1)
    """Take at most this many training rows in all."""

    def paths(self) -> list[str]:
        """What every source of both splits names."""
        held_out = self.eval if isinstance(self.eval, tuple) else ()
        return [source.path for source in (*self.train, *held_out)]

    @field_validator("eval")
    @classmethod
    def _real_share(cls, value: Any) -> Any:
        if isinstance(value, float | int) and not 0 < value < 1:
            raise ValueError("a share lies between 0 % and 100 %; write `5%`, a file, or `null`")
        return value


class Training(Section):
    """How long, how fast, and how much at a time."""

    learning_rate: float | None = Field(None, gt=0, le=10)
    """The peak learning rate; lora and qlora 2e-4, adapter 1e-4, full 1e-5 when absent."""
    epochs: float = Field(3.0, gt=0)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1)
    """The effective batch: rows per optimizer step."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Rows per forward pass; `auto` is the most that fits and divides batch_size."""
    optimizer: Optimizer | None = None
    """adamw_torch_fused, or paged_adamw_32bit on a 4-bit base, when absent."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[Share, Field(ge=0)] = 0.03
    """Warm-up as a share of all steps (`3%`), or a number of steps from 1 on."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune: noise on the embeddings while training; 5 is usual (arXiv 2310.05914)."""
    checkpointing: Literal["auto", "none", "full"] = "auto"
    """Recompute activations in the backward pass: less memory, about a third slower."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto` runs layers and loss on fused functions where the model has them; `plain` never."""
    packing: Literal["auto"] | bool = "auto"
    """Several rows in one sequence, with attention kept apart; `auto` packs plain text."""
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; as often as the evaluation when absent."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay: the best and the newest ones."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`cuda` refuses to run without a GPU."""
    memory_limit_gib: float | None = Field(None, gt=0)
    """Use at most this much of the GPU, where others work on it too; all when absent."""
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    """Experiment trackers that also receive the metrics."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Whether a loss or gradient that is not finite, or exploded, stops the run or its step."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """With `skip`, stop after this many steps in a row whose loss or gradient is not finite."""
    on_oom: Literal["stop", "shrink"] = "stop"
    """Out of memory: stop, or go on from the last step with half the rows at a time."""

    @field_validator("micro_batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"at least 1, found {value}; or write `auto`")
        return value

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"a share below 1 or a whole number of steps, found {value}")
        return value

    @model_validator(mode="after")
    def _divides(self) -> Training:
        micro = self.micro_batch_size
        if isinstance(micro, int) and self.batch_size % micro:
            text = (
                f"{micro} does not divide `batch_size` {self.batch_size}; batch_size is the "
                "effective batch, gradient accumulation follows from the two"
            )
            raise Conflict([(("micro_batch_size",), text)])
        return self


class Gates(Section):
    """Conditions on the finished model; each fails only when the rows show that it is broken."""

    fail_under: dict[str, Share] = Field(default_factory=dict)
    """Metric -> the least score of the tuned model, such as `{exact_match: 80%}`."""
    min_gain: Share | None = None
    """The least gain over the base in the first metric; 0 means no regression."""
    max_forgetting: Annotated[Share, Field(ge=0)] | None = None
    """The most that the loss on retained text may rise: `2%`."""
    max_merge_drift: Annotated[Share, Field(ge=0)] | None = None
    """The most that merging may change the loss: `0.1%`."""
    require_proof: bool = False
    """Whether a condition that the rows leave open fails too."""

    @field_validator("fail_under")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name, limit in value.items():
            if _metric(name).percent and not 0 <= limit <= 1:
                raise ValueError(
                    f"{name} lies between 0 and 1, found {limit:g}; write `{limit:g}%`"
                )
        return value


class Evaluation(Section):
    """When the held-out rows are looked at during training, and how the result is judged."""

    steps: int | None = Field(None, ge=1)
    """Steps between evaluations; ten times a run when absent."""
    batch_size: int | None = Field(None, ge=1)
    """Rows per evaluation batch; the micro-batch when absent."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many evaluations without a better loss."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """How much lower the loss must be to count as better."""
    keep_best: bool = True
    """Save the adapter of the best evaluation; `false` saves the last."""
    metrics: Names = ()
    """Scores of `peftcli eval`, the first one gates; chosen by content when empty."""
    retain: Names | None = None
    """Text that should not be forgotten: files, `[]` for none; the bundled text when absent."""
    max_new_tokens: int | None = Field(None, ge=1)
    """The longest answer; a quarter longer than the longest reference when absent."""
    gates: Gates | None = None
    """Conditions on the finished model; with some, `train` ends with an evaluation."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _metric(name)
        return value


class Recipe(Section):
    """One run: a model, a method, data, and how to train."""

    model: Annotated[Model, _as_mapping("name")]
    """The base model: a hub id, a local folder, `bundled:tiny`, or a section."""
    method: Annotated[AnyMethod, _as_mapping("name")]
    """The tuning method: a name, or a section with its keys."""
    data: Data
    """The rows."""
    training: Training = Field(default_factory=Training)
    """The training run."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Evaluation while training."""
    output: str = Field(min_length=1)
    """The run folder."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of initial weights, row order and dropout."""

    @model_validator(mode="after")
    def _between_sections(self) -> Recipe:
        found: list[tuple[tuple[str, ...], str]] = []
        saves, looks = self.training.save_steps, self.evaluation.steps
        if saves and looks and self.evaluation.keep_best and saves % looks:
            text = (
                f"{saves} is no multiple of `evaluation.steps` {looks}, so the best checkpoint "
                f"could not be kept; write {looks * max(1, saves // looks)}"
            )
            found.append((("training", "save_steps"), text))
        for key in ("steps", "early_stopping", "gates"):
            written = self.evaluation.model_dump(include={key})[key] is not None
            if written and self.data.eval is None:
                text = "needs held-out rows, and `data.eval` is null; name some, or remove it"
                found.append((("evaluation", key), text))
        gates = self.evaluation.gates
        if gates and gates.max_merge_drift is not None and not self.method.mergeable:
            text = f"nothing is merged after `{self.method.name}`; remove it"
            found.append((("evaluation", "gates", "max_merge_drift"), text))
        refuse_conflicts([*found, *self._against_fp8()])
        return self

    def _against_fp8(self) -> list[tuple[tuple[str, ...], str]]:
        """Keys that keep the fused layers away, where the base is to be in fp8."""
        if not self.method.frozen_in_fp8:
            return []
        needs = "`method.quantization: fp8` needs"
        found = {
            ("training", "kernels"): (self.training.kernels == "plain", "`auto`"),
            ("training", "neftune_noise_alpha"): (
                self.training.neftune_noise_alpha is not None,
                "it absent",
            ),
            ("model", "attention"): (self.model.attention != "auto", "`auto`"),
            ("model", "dtype"): (
                self.model.dtype in ("float16", "float32"),
                "`auto` or `bfloat16`",
            ),
        }
        return [(key, f"{needs} {what}") for key, (clash, what) in found.items() if clash]

    @property
    def learning_rate(self) -> float:
        """The recipe's learning rate, or the method's own."""
        return self.training.learning_rate or self.method.default_learning_rate

    @property
    def optimizer(self) -> str:
        """The recipe's optimizer, or the method's own."""
        return self.training.optimizer or self.method.optimizer()

    def warnings(self) -> list[str]:
        """What is allowed and unusual, one sentence each."""
        low, high = self.method.usual_learning_rates
        if low <= self.learning_rate <= high:
            return []
        return [
            f"training.learning_rate: {self.learning_rate:g} lies outside the usual "
            f"{low:g} to {high:g} for {self.method.name}; "
            f"{self.method.default_learning_rate:g} is the default. Low-rank and adapter methods "
            "stand about ten times the rate of full fine-tuning"
        ]


SECTIONS: dict[str, type[Section]] = {
    "model": Model,
    "data": Data,
    "train": Source,
    "eval": Source,
    "training": Training,
    "evaluation": Evaluation,
    "gates": Gates,
}
