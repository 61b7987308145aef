"""The sections of a run's configuration: frozen, strictly checked models."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from ray_probe.config.comparison_checks import check_comparison
from ray_probe.config.field_types import (
    Address,
    Count,
    Decay,
    FeatureNames,
    NotNegative,
    OptionalCount,
    OptionalPositive,
    OptionalText,
    Positive,
    Prompts,
    Resources,
    RunName,
    RuntimeEnv,
    Seed,
    Text,
    TokenIds,
    TopP,
    check_features,
    check_resources,
    check_runtime_env,
    check_trainable,
    refusal,
)
from ray_probe.config.reporting import MetricsConfig, NotifyConfig
from ray_probe.config.section import Section
from ray_probe.config.series import SeriesConfig
from ray_probe.core.columns import LOGIT_COLUMNS, recommended


class ModelConfig(Section):
    """The checkpoint, and which of its parameters the gradient is taken for."""

    path: Text
    """Checkpoint directory, or a hub name when `local_files_only` is false."""
    revision: OptionalText = None
    """Branch, tag or commit of a hub model; null: its default branch."""
    local_files_only: bool = True
    """Never go to the network for a checkpoint."""
    adapter: OptionalText = None
    """PEFT adapter directory; null: none."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision of the weights; gradients accumulate in float32 or wider."""
    trainable: Annotated[Text, AfterValidator(check_trainable)] = "all"
    """Parameters of the gradient: all, adapter (the adapter's alone), or a regular expression over parameter names."""
    cache_dir: OptionalText = None
    """Directory on each node that a checkpoint is copied to once, before it is loaded; null: loaded where it lies."""
    snapshot: Literal["link", "copy"] | None = None
    """How a service pins a queued checkpoint: link (hard links), copy (for trainers that write in place); null: not."""


class DataConfig(Section):
    """The prompts."""

    prompts: Prompts
    """Path of a JSONL or parquet file, a data set (`datasets:NAME:SPLIT`, NAME also a directory), or a list."""
    field: Text = "prompt"
    """Name of the field that holds the prompt."""
    id_field: OptionalText = "id"
    """Name of the field that holds a prompt's id (`id` may be missing); null: ids are line numbers."""
    chat_template: bool = False
    """Put prompts (strings or lists of messages) through the tokenizer's chat template; false: strings as they are."""
    max_prompt_tokens: OptionalCount = None
    """Longest prompt, in tokens; null: no limit but the model's context."""
    context_length: OptionalCount = None
    """Tokens of a prompt with its response, at most; null: the model's context, rotary scaling counted."""
    on_long: Literal["error", "skip"] = "error"
    """What a longer prompt does: it ends the run, or is skipped and counted."""
    repeat: bool = True
    """Go round again, reshuffled, when the prompts are used up; false: too few prompts is an error."""
    seed: Seed = 0
    """Seed of the run, from which each response's own follows."""


class TargetError(Section):
    """The error at which a run is precise enough."""

    of: Literal["gradient", "entropy", "change"]
    """What is to be known: the gradient as a vector, the entropy per sequence, or its change in a comparison."""
    relative: OptionalPositive = None
    """Standard error over the estimate; of the gradient sqrt(trace_cov / N) / norm_debiased."""
    nats: OptionalPositive = None
    """Standard error of the entropy per sequence or of its change, nats, in the place of `relative`."""

    @model_validator(mode="after")
    def _has_one_size(self) -> "TargetError":
        if (self.relative is None) == (self.nats is None):
            raise refusal("set relative or nats, and not both", field="relative", value=self.relative)
        if self.of == "gradient" and self.nats is not None:
            raise refusal("need relative: the gradient has no error in nats", field="nats", value=self.nats)
        return self


class BatchConfig(Section):
    """How many responses, and how they are cut into shards."""

    prompts_per_round: Count = 32
    """Prompts in a round, drawn without replacement within a pass over the prompts."""
    responses_per_prompt: Count = 4
    """Responses sampled for each prompt."""
    shard_prompts: Count = 4
    """Prompts in a shard: the unit of work, retry and determinism."""
    rounds: OptionalCount = 4
    """Rounds in the run; null: as many whole rounds as `max_sequences` or `max_seconds` allow."""
    max_sequences: OptionalCount = None
    """No round starts that would exceed this number of responses; null: no limit."""
    max_seconds: OptionalPositive = None
    """No round starts once the earlier rounds took this many seconds; null: no limit."""
    target_error: TargetError | None = None
    """The error that ends the run: of (gradient, entropy, change) and relative or nats; needs `rounds: null`."""

    @model_validator(mode="after")
    def _has_an_end(self) -> "BatchConfig":
        if self.rounds is None and self.max_sequences is None and self.max_seconds is None:
            remedy = "need a number of rounds, batch.max_sequences or batch.max_seconds: without one the run has no end"
            raise refusal(remedy, field="rounds", value=None)
        needed = self.prompts_per_round * self.responses_per_prompt
        if self.max_sequences is not None and self.max_sequences < needed:
            remedy = f"need at least {needed}, one round of prompts_per_round x responses_per_prompt"
            raise refusal(remedy, field="max_sequences", value=self.max_sequences)
        if self.target_error is not None and self.rounds is not None:
            raise refusal("need null: batch.target_error decides how many", field="rounds", value=self.rounds)
        return self


class GenerationSettings(Section):
    """The sampling policy and its batch sizes."""

    temperature: Positive = 1.0
    """Divides the logits; no unit."""
    top_p: TopP = 0.95
    """Probability mass of the nucleus; 1 keeps the whole vocabulary."""
    max_new_tokens: Count = 64
    """Cap on a response, in tokens."""
    eos_token_ids: TokenIds = None
    """Token ids that end a response; null: the checkpoint's; an empty list: only the cap does."""
    gen_batch_size: Count = 32
    """Sequences generated at once, at most; a batch never crosses shards."""
    tf_batch_size: Count = 8
    """Sequences in one teacher-forced forward pass, at most."""
    tf_batch_tokens: Count = 16384
    """Positions in one teacher-forced forward pass, prompts and padding included, at most; one sequence always goes."""
    rb_requires_grad: bool = True
    """Keep the pathwise term; false only to look at the score term alone."""
    parity_tolerance: OptionalPositive = None
    """Largest mean gap of log q between sampling and scoring, in nats; null: by dtype."""


class BaselineConfig(Section):
    """The baseline `mu_hat` of the score term."""

    mode: Literal["none", "constant", "residual_mu", "regression"] = "regression"
    """What `mu_hat` is: none, constant, residual_mu or regression."""
    fit: Literal["leave_one_out", "in_sample", "lagged"] = "leave_one_out"
    """Which records the fit used for a shard comes from; in_sample is biased."""
    ridge_lambda: Positive = 1e-3
    """Added to the diagonal of Phi^T Phi, which is a sum over tokens and not a mean."""
    features: Annotated[FeatureNames, AfterValidator(check_features)] = "recommended"
    """Columns of the regression: recommended (by `responses_per_prompt`), logits (the seven of logits), or a list."""
    ema_decay: Decay = 0.9
    """Share of the old value in the moving average of `residual_mu`."""


class EstimatorConfig(Section):
    """The gradient estimator."""

    x_estimator_mode: Literal["rb_residual", "naive"] = "rb_residual"
    """rb_residual: the exact entropy of each step; naive: surprisals of the sampled tokens, noisier."""
    pass_: Annotated[Literal["auto", "one", "two"], Field(alias="pass")] = "auto"
    """Forward passes a response: one (graphs are held until the fit is there), two (bounded memory), or by memory."""
    memory_budget_gb: OptionalPositive = None
    """Memory of an actor for held graphs, GB; null: what is free on its device."""
    activation_checkpointing: bool = False
    """Compute each layer again in the backward pass: less memory, a third more time."""
    baseline: BaselineConfig = BaselineConfig()
    """The baseline."""


class ClusterConfig(Section):
    """Where Ray is, and what each rollout actor gets."""

    address: Address = None
    """null: start Ray here; auto: the cluster that is running; or host:port of its head."""
    namespace: Text = "ray_probe"
    """Ray namespace of the named actors."""
    actors: Count = 2
    """Rollout actors asked for at the start."""
    max_actors: Count = 4
    """Cap on the actors of a Ray started here, and the slots that it declares: how far `scale` can go there."""
    gpus_per_actor: NotNegative = 0.0
    """GPUs of each actor; 0 runs on the CPU."""
    cpus_per_actor: Count = 1
    """CPU cores, and torch threads, of each actor."""
    resources: Annotated[Resources, AfterValidator(check_resources)] = {}
    """Custom Ray resources of each actor, name to amount."""
    runtime_env: Annotated[RuntimeEnv, AfterValidator(check_runtime_env)] = {}
    """Ray runtime environment of the actors, handed on as it is."""

    @property
    def slots(self) -> int:
        """Actor slots of a Ray started here: never fewer than `actors`."""
        return max(self.actors, self.max_actors)


class CompareConfig(Section):
    """The checkpoint A that `model`, B, is compared with, and shared responses."""

    against: OptionalText = None
    """Checkpoint directory of A; null: no comparison."""
    adapter: OptionalText = None
    """PEFT adapter directory of A; null: none."""
    side: Literal[0, 1] = 0
    """Side of A in the seeds of responses; 1 at odd places of a chain, so that both neighbours share its responses.
    Of a gradient that keeps or reads responses, the side of its checkpoint."""
    keep_responses: bool = False
    """Keep the token ids of B's responses in the run directory, for a next step; of a gradient, its own."""
    responses_from: OptionalText = None
    """Run directory of the measurement before in a chain or series, which kept A's responses; null: they are sampled.
    Of a gradient, one that kept responses of its checkpoint: a comparison with twice as many a prompt."""
    parts: bool = False
    """Also tell the parts of the change by group of parameters: to first order at (A + B) / 2, a third policy with as
    many responses of its own. Both checkpoints are loaded again once a round. Needs full weights of one
    architecture."""


class OutputConfig(Section):
    """What a run leaves, and where."""

    dir: Text = "runs"
    """Directory that holds the run directories."""
    name: RunName = None
    """Name of the run directory; null: CONFIG-UTCTIME-4HEX."""
    save_gradient: bool = False
    """Write the mean gradient to gradient.safetensors, 8 bytes a parameter."""
    commit_rounds: Count = 1
    """Rounds between two commits of the gradient; uncommitted shards of a dead actor are recomputed."""


class ProbeConfig(Section):
    """A whole run."""

    model: ModelConfig
    """The checkpoint."""
    data: DataConfig
    """The prompts."""
    batch: BatchConfig = BatchConfig()
    """Rounds, responses and shards."""
    generation: GenerationSettings = GenerationSettings()
    """The sampling policy."""
    estimator: EstimatorConfig = EstimatorConfig()
    """The gradient estimator and its baseline."""
    compare: CompareConfig = CompareConfig()
    """A comparison of two checkpoints."""
    series: SeriesConfig = SeriesConfig()
    """The place in a series of checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Sinks of figures."""
    notify: NotifyConfig = NotifyConfig()
    """What is called at the end."""
    cluster: ClusterConfig = ClusterConfig()
    """Ray."""
    output: OutputConfig = OutputConfig()
    """The run directory."""

    @model_validator(mode="after")
    def _fits_what_is_measured(self) -> "ProbeConfig":
        check_comparison(self)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the regression's columns, as `features` says."""
        features = self.estimator.baseline.features
        if features == "recommended":
            return recommended(self.batch.responses_per_prompt)
        return LOGIT_COLUMNS if features == "logits" else tuple(features)
