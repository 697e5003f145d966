"""A run as a page on the Weights & Biases server: front, curves, tables, pictures.

    python -P wandb_report.py '{"project": ..., "run_id": ..., "budgets": [...]}'

As a program it saves the page and prints its address. It imports nothing of this package, so that
it starts soon.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

#: Stages that train: what is plotted over their steps.
_TRAININGS = {
    "baseline": ("Dense network trained alone", ("loss",)),
    "supernet": ("Supernet", ("loss", "ce", "kd")),
    "finalize": ("Ladder to each budget", ("loss", "ce_target", "kd_target")),
}


def build(entity: str, project: str, run_id: str, budgets: Sequence[str]) -> Any:
    """The page as an object, which needs no server until it is saved.

    Args:
        entity: user or team that the project belongs to.
        project: wandb project.
        run_id: the group of the run's stages.
        budgets: labels of the run's budgets.

    Returns:
        A `wandb_workspaces.reports.v2.Report`.
    """
    import wandb_workspaces.reports.v2 as wr

    def grid(kinds: Sequence[str], panels: list[Any]) -> Any:
        kind = f" and JobType in {list(kinds)}" if kinds else ""
        runs = wr.Runset(
            entity=entity, project=project, name=run_id, filters=f"Group = '{run_id}'{kind}"
        )
        return wr.PanelGrid(runsets=[runs], panels=panels)

    def wide(panel: Any) -> Any:
        panel.layout = wr.Layout(w=24, h=10)
        return panel

    best: list[Any] = [f"explore/best/{budget}" for budget in budgets]
    blocks = [
        wr.TableOfContents(),
        wr.H1("What came out"),
        grid(["report"], [wide(wr.WeavePanelSummaryTable(table_name="report/budgets"))]),
        grid(
            ["finalize", "control", "supernet", "baseline"],
            [wide(wr.ScatterPlot(title="Top-1 against MACs", x="macs", y="top1"))],
        ),
        grid(
            ["report"],
            [wide(wr.MediaBrowser(media_keys=["report/architecture", "report/accuracy"]))],
        ),
        wr.H1("Candidates"),
        grid(
            ["explore"],
            [
                wr.LinePlot(title="Best score", x="explore/generation", y=best),
                wr.CustomChart(
                    query={"summaryTable": {"tableKey": "explore/scored_plot_table"}},
                    chart_name="wandb/scatter/v0",
                    chart_fields={"x": "macs", "y": "score"},
                ),
                wide(wr.WeavePanelSummaryTable(table_name="explore/scored")),
            ],
        ),
        wr.H1("Training"),
    ]
    for kind, (title, losses) in _TRAININGS.items():
        x = f"{kind}/step"
        curves = [wr.LinePlot(title=name, x=x, y=[f"{kind}/{name}"]) for name in losses]
        blocks += [wr.H2(title), grid([kind], curves)]
    return wr.Report(
        entity=entity,
        project=project,
        title=run_id,
        description=f"Structured pruning to the budgets {', '.join(budgets)}.",
        blocks=blocks,
    )


def main() -> None:
    """Save the page that `sys.argv[1]` describes."""
    import wandb

    entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity or ""
    print(build(entity=entity, **json.loads(sys.argv[1])).save().url)


if __name__ == "__main__":
    main()
