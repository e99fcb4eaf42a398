"""The look of the report's page: one column on a phone, light or dark as the reader has it."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2530; --soft: #5c6776; --rule: #cfd6de; --paper: #f6f7f9; --card: #ffffff;
  --good: #1a7f4b; --bad: #c0362c; --warn: #9a6700; --live: #0b62b8;
  --series-0: #0b62b8; --series-1: #cf4a2e; --series-2: #1d8f60;
  --series-3: #b17a00; --series-4: #7b51c9; --series-5: #0c8795;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ee; --soft: #98a4b3; --rule: #3a4350; --paper: #12161c; --card: #1a2028;
    --good: #4cc38a; --bad: #ff7a6b; --warn: #e0a93b; --live: #6cb2ff;
    --series-0: #6cb2ff; --series-1: #ff8a6b; --series-2: #56c999;
    --series-3: #e3b341; --series-4: #b894ff; --series-5: #4fc7d3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h1 { margin: 0.5rem 0 0; }
h2 { margin: 0 0 0.75rem; font-size: 1.25rem; }
header p, section > p, small, dt, time, .quiet { color: var(--soft); }
header p { margin: 0 0 1rem; }
section > p, small { font-size: 0.875rem; }
section {
  background: var(--card); border: 1px solid var(--rule); border-radius: 0.75rem;
  padding: 1rem; margin: 0 0 1rem;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.6rem; text-align: right; white-space: pre; }
th { color: var(--soft); font-weight: 500; font-size: 0.875rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td::first-line { color: var(--ink); }
td:first-child { color: var(--soft); }
tbody tr { border-top: 1px solid var(--rule); }
.figures {
  display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 40rem; height: auto; margin-top: 0.25rem; }
figure svg text { font-family: inherit !important; }
.key { display: inline-block; margin-right: 0.75rem; font-size: 0.875rem; }
.key i { display: inline-block; width: 1.25rem; margin-right: 0.35rem; vertical-align: middle; }
.badge {
  font-size: 0.8rem; font-weight: 500; padding: 0.1rem 0.6rem; border-radius: 1rem;
  border: 1px solid currentColor; color: var(--live); vertical-align: middle;
}
.badge.finished { color: var(--good); }
.badge.failed, .badge.lost { color: var(--bad); }
.badge.stopped, .badge.created { color: var(--warn); }
section > p.reason { color: var(--bad); font-size: 1rem; overflow-wrap: anywhere; }
dl {
  display: grid; gap: 0.75rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
}
dt { font-size: 0.8rem; }
dd { margin: 0; font-weight: 500; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 500; }
pre {
  overflow-x: auto; padding: 0.75rem; border-radius: 0.5rem; background: var(--paper);
  font-size: 0.8125rem; line-height: 1.4;
}
.timeline { list-style: none; margin: 0.75rem 0 0; padding: 0; font-size: 0.9rem; }
.timeline li {
  display: grid; grid-template-columns: 5rem 1fr; padding: 0.15rem 0.75rem;
  border-left: 3px solid var(--rule); overflow-wrap: anywhere;
}
.timeline li.state { border-color: var(--live); }
.timeline li.good { border-color: var(--good); }
.timeline li.fault { border-color: var(--bad); color: var(--bad); }
.timeline time { font-variant-numeric: tabular-nums; }
"""
