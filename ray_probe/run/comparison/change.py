"""The types of the section `change` of result.json."""

from dataclasses import dataclass, field

from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class Figure(JsonObject):
    """An estimate with its standard error for prompts like these, prompts as clusters."""

    value: float | None = None
    """The estimate."""
    se: float | None = None
    """Its standard error; null for one prompt."""


@dataclass(frozen=True)
class ChangeFigure(Figure):
    """A part of the change of entropy, nats a response."""

    value: float | None = None
    """The estimate."""
    se: float | None = None
    """Its standard error for prompts like these, prompts as clusters; null for one prompt."""
    se_within: float | None = None
    """Standard error for these very prompts; null where responses of a prompt share baselines (columns of siblings)."""
    interval: tuple[float, float] | None = None
    """95 % interval for prompts like these; by Student's t below 64 prompts."""


@dataclass(frozen=True)
class AtBoth(JsonObject):
    """A quantity at each checkpoint and its change."""

    a: Figure = field(default_factory=Figure)
    """At A."""
    b: Figure = field(default_factory=Figure)
    """At B."""
    change: Figure = field(default_factory=Figure)
    """At B less at A."""


@dataclass(frozen=True)
class Shares(JsonObject):
    """A share of each checkpoint's own responses or tokens."""

    a: float | None = None
    """Of A's."""
    b: float | None = None
    """Of B's."""


@dataclass(frozen=True)
class OutsideShares(JsonObject):
    """Shares of one policy's tokens outside the other's nucleus."""

    a_of_b: float | None = None
    """Of A's tokens, outside B's nucleus."""
    b_of_a: float | None = None
    """Of B's tokens, outside A's nucleus."""


@dataclass(frozen=True)
class Divergence(JsonObject):
    """Kullback-Leibler divergences of responses, nats."""

    ab: float | None = None
    """Of B from A, over A's responses; null where infinite: B cannot give some response of A."""
    ba: float | None = None
    """Of A from B, over B's responses; null where infinite."""


@dataclass(frozen=True)
class ChangePart(JsonObject):
    """The part of the change that is made in some range.

    The parts of a list add up to the total.
    """

    first: float = 0.0
    """Start of the range: a position, from 0, or an entropy, nats."""
    last: float = 0.0
    """End of the range, not inside; equal to `first` for tokens without a choice, of entropy 0."""
    tokens: float = 0.0
    """Tokens in the range."""
    value: float | None = None
    """Nats a response."""
    se: float | None = None
    """Its standard error for prompts like these, nats."""


@dataclass(frozen=True)
class PromptChange(JsonObject):
    """The part of the change that some prompts make."""

    prompt: int | None = None
    """Number of the prompt in its source, from 0; null for all others together."""
    responses: int = 0
    """Their responses."""
    value: float = 0.0
    """Nats a response of all; the values add up to the total."""


@dataclass(frozen=True)
class PartChange(JsonObject):
    """The part that a group of parameters makes, to first order at (A + B) / 2."""

    group: str = ""
    """Parameters of the group: embedding, head, norms, or a layer's q, k, v, o, qkv, mlp or norms."""
    value: float | None = None
    """Nats a response: the gradient at (A + B) / 2 times B - A, over these parameters."""
    se: float | None = None
    """Its standard error, shards as clusters; null below 8 shards, or where they share prompts."""


@dataclass(frozen=True)
class Change(JsonObject):
    """The change of the entropy of responses from checkpoint A to checkpoint B."""

    total: ChangeFigure = field(default_factory=ChangeFigure)
    """J(B) - J(A), nats a response."""
    pathwise: ChangeFigure = field(default_factory=ChangeFigure)
    """The part by which the policy changed at the states that are visited."""
    visitation: ChangeFigure = field(default_factory=ChangeFigure)
    """The part by which the states changed that are visited."""
    entropy_a: Figure = field(default_factory=Figure)
    """J(A), nats a response: the mean of both less half of the total."""
    entropy_b: Figure = field(default_factory=Figure)
    """J(B), nats a response."""
    per_token: AtBoth = field(default_factory=AtBoth)
    """E[sum of H] / E[T] at each checkpoint, nats a token."""
    length: AtBoth = field(default_factory=AtBoth)
    """Length of a response, tokens."""
    truncated: Shares = field(default_factory=Shares)
    """Share of the responses that were cut at `generation.max_new_tokens`."""
    js: float | None = None
    """Jensen-Shannon divergence of the responses, nats; at most log 2."""
    kl: Divergence = field(default_factory=Divergence)
    """Kullback-Leibler divergences."""
    effective_sample_share: float | None = None
    """Effective sample size of A's responses for B, as a share of their number."""
    outside: OutsideShares = field(default_factory=OutsideShares)
    """Tokens that the other policy cannot sample."""
    moved_share: float | None = None
    """Share of the parameters that differ; null with adapters and for different architectures."""
    clusters: int = 0
    """Different prompts."""
    positions: tuple[ChangePart, ...] = ()
    """By position of the token where the change is made."""
    token_entropy: tuple[ChangePart, ...] = ()
    """By the token's entropy, the mean of both policies: no choice, then fifths of the other tokens."""
    prompts: tuple[PromptChange, ...] = ()
    """The ten largest parts each way, and the rest."""
    parts: tuple[PartChange, ...] = ()
    """By group of parameters, where `compare.parts` is set; with the remainder they add up to the total."""
    remainder: Figure = field(default_factory=Figure)
    """The total less its parts: what first order leaves out; for `top_p < 1` also tokens that enter or leave a nucleus.

    Its error takes both as independent, which is too large rather than too small: they share prompts."""
