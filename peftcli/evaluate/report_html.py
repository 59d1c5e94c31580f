"""report.html: one file with everything, readable without a network and without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from peftcli.evaluate.charts import Bar, bars, curve
from peftcli.evaluate.result import Evaluation, Example, Latency
from peftcli.evaluate.wording import (
    figure,
    headlines,
    is_share,
    p_text,
    perplexity,
    size_text,
    spread,
)


def html_report(evaluation: Evaluation) -> str:
    """The whole page; every text of rows, files and recipe is escaped."""
    style = (files("peftcli") / "evaluate" / "report.css").read_text("utf-8")
    sections = [
        _head(evaluation),
        _gates(evaluation),
        _scores(evaluation),
        _differences(evaluation),
        _forgetting(evaluation),
        _latency(evaluation),
        _curve(evaluation),
        _examples(evaluation),
        _ground(evaluation),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(evaluation.source)}: evaluation</title>"
        f"<style>\n{style}</style></head><body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _head(evaluation: Evaluation) -> str:
    arms = "".join(
        f'<li><b class="{escape(arm.name)}">{escape(arm.name)}</b> {escape(arm.what)}</li>'
        for arm in evaluation.arms
    )
    lines = "".join(f"<p>{escape(line)}</p>" for line in headlines(evaluation))
    return (
        f"<header><h1>{escape(evaluation.source)}</h1>"
        f'<ul class="arms">{arms}</ul><div class="verdict">{lines}</div></header>'
    )


def _gates(evaluation: Evaluation) -> str:
    if not evaluation.gates:
        return ""
    rows = [
        (f'<b class="{gate.outcome}">{gate.outcome}</b>', escape(gate.name), escape(gate.reason))
        for gate in evaluation.gates
    ]
    return _section("Gates", _table(("", "gate", "why"), rows))


def _scores(evaluation: Evaluation) -> str:
    parts = []
    for metric in dict.fromkeys(one.metric for one in evaluation.scores):
        found = [one for one in evaluation.scores if one.metric == metric]
        rows = [
            Bar(
                one.arm,
                one.value,
                one.low,
                one.high,
                f"{figure(metric, one.value)} ({spread(metric, one.low, one.high)})",
            )
            for one in found
        ]
        extra = ""
        if metric == "loss":
            each = ", ".join(f"{one.arm} {perplexity(one.value)}" for one in found)
            extra = f"; perplexity: {each}"
        unit = "nats per answer token" if metric == "loss" else ""
        note = escape(", ".join(filter(None, (unit, f"{found[0].rows} rows"))) + extra)
        top = 1.0 if is_share(metric) else None
        parts.append(
            f"<figure><figcaption><b>{escape(metric)}</b> <span>{note}</span></figcaption>"
            f"{bars(rows, highest=top)}</figure>"
        )
    return _section("Scores", "".join(parts), "Whiskers are 95 % intervals.")


def _differences(evaluation: Evaluation) -> str:
    rows = [
        (
            escape(one.metric),
            escape(f"{one.first} → {one.second}"),
            figure(one.metric, one.value, signed=True),
            spread(one.metric, one.low, one.high, signed=True),
            p_text(one.p_value),
            escape(one.verdict),
            figure(one.metric, one.smallest_drop).removesuffix(" %"),
        )
        for one in evaluation.differences
    ]
    if not rows:
        return ""
    heads = ("metric", "arms", "change", "95 % interval", "p", "verdict", "smallest visible drop")
    note = (
        "Paired by row: exact McNemar where rows are right or wrong, else the bootstrap. A "
        "difference inside its interval is no difference. The last column is the drop that this "
        "many rows would show in four of five evaluations. Shares are in points."
    )
    return _section("Differences", _table(heads, rows), note)


def _forgetting(evaluation: Evaluation) -> str:
    rows = [
        (
            escape(one.source),
            f"{one.documents}",
            f"{one.base_loss:.4f}",
            f"{one.tuned_loss:.4f}",
            f"{one.ratio - 1:+.1%} ({one.low - 1:+.1%} to {one.high - 1:+.1%})",
            f"{one.same_next_token:.1%}",
            f"{one.same_answer:.1%}",
            f"{one.shared_start:.1%}",
        )
        for one in evaluation.forgetting
    ]
    if not rows:
        return ""
    heads = (
        *("text", "documents", "loss before", "loss after", "change"),
        *("same next token", "same greedy text", "shared start"),
    )
    return _section("Forgetting", _table(heads, rows), "Text that is not about the task.")


def _latency(evaluation: Evaluation) -> str:
    if not evaluation.latency:
        return ""
    size = {arm.name: arm.weights_gib for arm in evaluation.arms}
    rows = [_latency_row(one, size.get(one.arm)) for one in evaluation.latency]
    first = evaluation.latency[0]
    turns = "arms taking turns" if first.interleaved else "one arm"
    note = (
        f"Medians of {first.repetitions} repetitions, {turns}; prompt of {first.prompt_tokens} "
        f"tokens, {first.new_tokens} new ones, greedy."
    )
    heads = ("model", "batch", "first token", "tokens/s", "95 % of tokens", "weights", "peak")
    return _section("Cost of an answer", _table(heads, rows), note)


def _latency_row(one: Latency, weights: float | None) -> tuple[str, ...]:
    return (
        escape(one.arm),
        f"{one.batch}",
        f"{1000 * one.first_token_seconds:.1f} ms",
        f"{one.tokens_per_second:,.0f}",
        f"{1000 * one.p95_token_seconds:.1f} ms",
        size_text(weights),
        size_text(one.peak_gib),
    )


def _curve(evaluation: Evaluation) -> str:
    if not evaluation.losses and not evaluation.eval_losses:
        return ""
    note = "Training loss with its running mean, and held-out loss (dots); nats per token."
    return _section("Loss curve", curve(evaluation.losses, evaluation.eval_losses), note)


def _examples(evaluation: Evaluation) -> str:
    parts = [_example(one, evaluation.primary) for one in evaluation.examples]
    return _section("Answers", "".join(parts)) if parts else ""


def _example(one: Example, primary: str) -> str:
    cells = "".join(
        f'<div><h3 class="{escape(arm)}">{escape(arm)} <span>'
        f"{escape(figure(primary, one.scores[arm]))}</span></h3><pre>{escape(text)}</pre></div>"
        for arm, text in one.answers.items()
    )
    return (
        f'<article><p class="why">{escape(one.why)}</p><pre class="question">'
        f'{escape(one.question)}</pre><div class="answers">{cells}'
        f"<div><h3>reference</h3><pre>{escape(one.reference)}</pre></div></div></article>"
    )


def _ground(evaluation: Evaluation) -> str:
    rows = evaluation.rows
    leaked = "not known" if rows.leaked is None else str(rows.leaked)
    facts = [
        ("rows", f"{rows.source}; {rows.held_out} for the loss, {rows.answered} for the scores"),
        ("left out as training rows", leaked),
        ("left out as cut", str(rows.cut)),
        *(("cut", text) for text in rows.cut_rows),
        ("rows twice", str(rows.repeated)),
        ("hash of the rows", rows.sha256),
        ("metrics", evaluation.why_metrics),
        *((f"note {i}", text) for i, text in enumerate(evaluation.notes, 1)),
        *((key, str(value)) for key, value in evaluation.settings.items()),
        ("seconds", f"{evaluation.seconds:.1f}"),
    ]
    table = _table(("what", ""), [(escape(name), escape(value)) for name, value in facts])
    recipe = f"<h2>Recipe</h2><pre>{escape(evaluation.recipe)}</pre>" if evaluation.recipe else ""
    return _section("What was measured on what", table) + recipe


def _section(title: str, body: str, note: str = "") -> str:
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{small}{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """`rows` hold HTML."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{table}</div>'
