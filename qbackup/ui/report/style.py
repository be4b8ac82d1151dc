"""How the page looks: light and dark, on a phone and on paper."""

import base64
import hashlib

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1b1f24; --quiet: #5b6673; --line: #dde2e8;
  --full: #475569; --incremental: #2f7bd6; --bad: #c62828; --good: #2e7d32;
  --m0: #eef1f5; --m1: #bfdbf7; --m2: #7ab3ee; --m3: #2f7bd6; --m4: #123f7a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161b; --card: #1b2128; --text: #e4e8ed; --quiet: #97a3b0; --line: #313a45;
    --full: #a3b1c2; --incremental: #5aa2f2; --bad: #ff7a72; --good: #74c77a;
    --m0: #262e37; --m1: #1d4573; --m2: #2f6fb5; --m3: #69adf5; --m4: #d4e8ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 64rem; background: var(--page); color: var(--text);
  font: 0.95rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; }
h2 { font-size: 1.2rem; margin: 0; }
h3 { font-size: 0.95rem; margin: 1.25rem 0 0.35rem; }
p { margin: 0.25rem 0; }
a { color: var(--incremental); }
.quiet { color: var(--quiet); }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 0.6rem;
  padding: 1rem; margin: 1rem 0;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; white-space: nowrap; }
thead th { color: var(--quiet); font-weight: 500; border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
td.number, th.number { text-align: right; }
td.text { white-space: normal; min-width: 15rem; }
.bad { color: var(--bad); font-weight: 600; }
.good { color: var(--good); }
svg { display: block; width: 100%; }
.lane { height: 3.5rem; border-bottom: 1px solid var(--line); }
.strip { height: 1.1rem; min-width: 9rem; background: var(--m0); border-radius: 0.2rem; }
.map { height: 0.8rem; min-width: 9rem; }
table.maps td, table.maps th, table.maps tr + tr td {
  border: 0; padding-top: 0; padding-bottom: 1px; font-weight: 400;
}
table.maps td.wide, table.chains td.wide { width: 75%; padding-right: 0; }
table.chains td { border: 0; padding-top: 0.15rem; padding-bottom: 0.15rem; }
.full { fill: var(--full); } .incremental { fill: var(--incremental); }
.damaged { fill: var(--bad); }
.m0 { fill: var(--m0); } .m1 { fill: var(--m1); } .m2 { fill: var(--m2); }
.m3 { fill: var(--m3); } .m4 { fill: var(--m4); }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; vertical-align: -0.1rem; }
.ends { display: flex; justify-content: space-between; color: var(--quiet); font-size: 0.85rem; }
@media (max-width: 36rem) {
  body { padding: 0.5rem; font-size: 0.9rem; }
  section { padding: 0.75rem; }
  th, td { padding-right: 0.5rem; }
  table.maps td.wide, table.chains td.wide { width: 60%; }
}
@media print { body { max-width: none; } section { break-inside: avoid; } }
"""

POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)
"""Nothing is loaded and nothing runs, and only this style counts (Content Security Policy)."""
