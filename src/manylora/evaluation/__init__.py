"""How good a slot is: its loss on examples, and the scores of the text it answers with. Slot -1 is the bare base."""

from manylora.evaluation.evaluate import evaluate_loss, evaluate_losses, evaluate_text

__all__ = ["evaluate_loss", "evaluate_losses", "evaluate_text"]
