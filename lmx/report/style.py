"""The look of a report, in light and dark, down to the width of a phone."""

CSS = """
:root { color-scheme: light dark; --paper: #fbfbfa; --card: #fff; --ink: #22252a; --soft: #6a7079;
  --grid: #dfe2e6; --accent: #2f7fd6; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1d2024; --ink: #e3e5e8;
  --soft: #9aa1ab; --grid: #363b42; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem; }
h1 { font-size: 1.6rem; margin: .3rem 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem; }
.note, .step, small, dt { color: var(--soft); }
.note { margin: 0 0 .8rem; font-size: .87rem; }
small { font-weight: normal; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 0; }
.tiles div, figure, .sample { background: var(--card); border: 1px solid var(--grid); border-radius: .6rem; }
.tiles div { padding: .55rem .8rem; }
dt { font-size: .8rem; }
dd { margin: 0; font-size: 1.15rem; font-weight: 600; overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .7rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 0 0 .6rem;
  list-style: none; }
.bar { display: flex; height: 1.6rem; border-radius: .4rem; overflow: hidden; margin: .2rem 0 .6rem; }
.bar span { min-width: 1px; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .45em; }
table { border-collapse: collapse; margin: .2rem 0 .6rem; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .16rem 1.2rem .16rem 0;
  border-bottom: 1px solid var(--grid); overflow-wrap: anywhere; }
th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide th, .wide td { overflow-wrap: normal; }
details { margin: .3rem 0; }
details details { margin-left: .3rem; padding-left: .8rem; border-left: 1px solid var(--grid); }
summary { cursor: pointer; font-weight: 600; padding: .15rem 0; }
.sample { padding: .5rem .8rem .6rem; min-width: 0; }
.step { font-size: .8rem; }
pre { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 22rem; overflow-y: auto;
  font: .84rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre i { font-style: normal; font-weight: 700; }
"""
