"""The collapse study: every request edited alone by every method, and everything measured that explains a collapse.

`cases` says which requests and what is special about them, `measure` edits and measures some of them, `parts` keeps
what is measured so that a killed run goes on, `limit` finds the guard's limit in it, `command` is the
verb, run by several processes.
The experiment is that of "Understanding the Collapse of LLMs in Model Editing" (Yang et al. 2024).
"""

from .command import run_study
from .limit import Judged, fit_limit, judge_limit

__all__ = ["Judged", "fit_limit", "judge_limit", "run_study"]
