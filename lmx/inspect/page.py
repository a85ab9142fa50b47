"""One self-contained page about what was seen inside of a model."""

from html import escape
from typing import Any

from lmx.inspect.data import for_page
from lmx.inspect.look import Look
from lmx.inspect.script import SCRIPT, STYLE
from lmx.report.html import document, embedded_json, section


def page(data: dict[str, Any], seen: Look) -> str:
    """The page of what :func:`lmx.inspect.data.as_data` gave; it loads nothing."""
    body = (
        _facts(data)
        + section("Predictions", _predictions(data))
        + section("Logit lens", _LENS)
        + (section("Attention", _ATTENTION) if seen.attention else "")
        + embedded_json("seen", for_page(data, seen))
        + f"<script>{SCRIPT}</script>\n"
    )
    return document(f"Inside {data['model']}", body, style=STYLE)


def _facts(data: dict[str, Any]) -> str:
    known = [p for p in data["predictions"] if p["known"]]
    facts = {"family": data["family"], "tokens": len(data["tokens"])}
    if data["source"]:
        facts["tokens of the source"] = len(data["source"])
    if known:
        facts["nats a token"] = f"{-sum(p['logprob'] for p in known) / len(known):.3f}"
        facts["arg-max"] = f"{sum(p['rank'] == 0 for p in known)} of {len(known)}"
    tiles = (f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in facts.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>\n'


def _predictions(data: dict[str, Any]) -> str:
    source = _SOURCE if data["source"] else ""
    return _PREDICTIONS.replace("SOURCE", source)


_SOURCE = '<h3 class="small">of the source</h3><div class="tokens" id="source-attribution"></div>'
_PREDICTIONS = """
<p class="note">The more orange a token, the less likely the model held it (full at 12 nats). Choose one to see what
belongs to it; "?" marks what the model would put where there is no token to compare.</p>
<div class="panel"><div class="tokens" id="tokens"></div></div>
<h3 id="told"></h3>
<div class="two">
<div class="panel"><h3 class="small">likeliest</h3><table id="top"></table></div>
<div class="panel"><h3 class="small">gradient times input: blue tokens speak for it, orange ones against it
(full at <span id="most"></span> nats)</h3><div class="tokens" id="attribution"></div>SOURCE</div>
</div>
"""
_LENS = """
<p class="note">What each layer would predict if the final norm and the head came right after it; the bluer, the surer.
Underlined where it is the token at the head of the column. The topmost row is the model's own prediction.</p>
<div class="wide"><table class="lens" id="lens"></table></div>
"""
_ATTENTION = """
<p class="note">Rows are the places that look, columns those that are looked at; colours go with the square root of the
weight.</p>
<div class="bar" id="kinds"></div>
<div class="panel"><h3 class="small" id="seen-from"></h3><div class="tokens" id="seen-tokens"></div></div>
<p></p><div class="heads" id="heads"></div>
"""
