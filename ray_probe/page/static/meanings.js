/* What each part of page and report means, in plain words. */
"use strict";

RayProbe.meanings = {
  curve: [
    "The entropy of a response is the sum over its tokens of the entropy of the distribution that each was sampled " +
      "from. It is 0 where only one response is possible. 0.69 nats more double the effective number of responses.",
    "Bands are ± one standard error for prompts like these. Neighbouring points share prompts, so a change is better " +
      "known than two bands suggest: read it below.",
  ],
  changes: [
    "Pathwise: at the prefixes that responses go through, the policy has become surer (below 0) or less sure (above 0).",
    "Visitation: responses go through other prefixes than before, at which the policy is surer (below 0) or less sure " +
      "(above 0).",
    "Both add up to the total. A change is seen where its 95 % interval leaves 0 out.",
  ],
  change: [
    "Pathwise: at the prefixes that responses go through, B is surer than A (below 0) or less sure (above 0).",
    "Visitation: B's responses go through other prefixes than A's, at which the policies are surer (below 0) or less " +
      "sure (above 0).",
    "Both add up to the total, exactly, whatever the distance between A and B.",
  ],
  parts: [
    "To first order at (A + B) / 2: the gradient of the entropy there times the update B - A, over the parameters of a " +
      "group. Above 0, the update of this group raised the entropy.",
    "What first order leaves out is the remainder. For top_p below 1 it also holds tokens that enter or leave a nucleus.",
  ],
  rounds: [
    "Each round has prompts of its own. Rounds that differ by many errors point to prompts in an order, not to the " +
      "checkpoint, which is the same in all.",
  ],
  figures: [
    "± is one standard error for prompts like these, with prompts as clusters. About 95 % of intervals of two errors " +
      "each way hold the true value. Errors for these very prompts leave the choice of prompts out.",
  ],
  vector: [
    "The gradient of the entropy of a response, by the policy's parameters. SNR is signal over noise of the whole " +
      "vector: below 1 its direction is mostly noise. The entropy and its change are well known long before this vector.",
  ],
  baseline: [
    "What the baseline leaves of the noise of the score term. It changes how many responses an error takes, never what " +
      "is estimated.",
  ],
};
