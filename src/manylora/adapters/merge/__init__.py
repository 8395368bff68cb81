"""Merging an adapter into its base, with the error measured: of every site, and of the logits."""

from manylora.adapters.merge.merged import merge
from manylora.adapters.merge.report import MergeReport

__all__ = ["MergeReport", "merge"]
