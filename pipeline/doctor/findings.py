"""What the doctor can find, and what to do about each kind."""

from dataclasses import dataclass

ADVICE = {
    "stale_weights": "Have the engine take the policy's weights after each update, and compare fingerprints; "
    "where rollouts are older on purpose, correct for it or lower the staleness",
    "precision": "Compute the log-probabilities of both sides in one precision, the head in fp32; or "
    "mask tokens beyond a band and watch the KL",
    "routes": "Replay the engine's experts in training (router_replay), and give both sides the same biases",
    "temperature": "Divide the trainer's logits by the temperature that was sampled with, and have the "
    "engine report log-probabilities after temperature and truncation",
    "retokenised": "Train on the ids that were sampled; never tokenize the completion's text again",
    "eos": "Keep the end token in what is trained on, let every end token of the model end a completion, and "
    "do not mask it as padding",
    "template": "Give engine and trainer the same prompt ids, rendered once by the model's own template, its "
    "generation prompt and one leading token included",
    "silent_zero": "Grade some completions by hand; count failures of the verifier apart and drop them, "
    "since a 0 in their place is learned from",
    "flat_groups": "Take problems of another difficulty, a larger group, or dynamic sampling: a group whose "
    "rewards are equal has no gradient",
    "truncation": "Raise max_tokens, or leave cut completions out of the loss (overlong filtering)",
    "micro_batch_loss": "Fix each token's share of the loss over the global batch before it is cut up, and "
    "check that padding and packing change no log-probability",
    "duplicates": "Give every sample of a prompt a seed of its own, and look for rows that were copied",
    "contamination": "Remove these problems from training, or the benchmark from the report",
    "entropy_collapse": "Raise clip_high or the temperature, add an entropy bonus or a KL penalty, lower the "
    "rate; go back to a checkpoint before it",
    "length_collapse": "Look at what short completions are paid for: a length penalty, a reward for format "
    "alone, an end token that is always right; go back to a checkpoint before it",
}
"""By kind."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault, with the numbers that show it."""

    kind: str
    evidence: str

    def row(self) -> dict[str, str]:
        """As the last line of the command has it."""
        return {"kind": self.kind, "evidence": self.evidence, "advice": ADVICE[self.kind]}
