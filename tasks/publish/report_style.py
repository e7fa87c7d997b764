"""How the report looks, and the few lines that sort its tables. Nothing is fetched from anywhere."""

from __future__ import annotations

# series colours keep apart in both schemes and for the colour-blind (after Okabe and Ito 2008)
CSS = """
:root { color-scheme: light dark; --bg:#fbfbf9; --card:#fff; --ink:#1c2126; --soft:#5d6770; --line:#e0e2de;
  --track:#eceeea; --good:#00795c; --bad:#b8480a; --accent:#005f9e;
  --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#b0589a; --c4:#a27a00; --c5:#3aa3d6; --c6:#6b5bb8; --c7:#7a7f85; }
@media (prefers-color-scheme: dark) { :root { --bg:#14171a; --card:#1c2024; --ink:#e8eaec; --soft:#9fa9b2;
  --line:#31373d; --track:#2a3036; --good:#3cc79c; --bad:#f08a4b; --accent:#6db8ee;
  --c0:#4aa8e8; --c1:#f58a3c; --c2:#2fc596; --c3:#db93c6; --c4:#e0b93a; --c5:#8ad2f5; --c6:#a99cf0; --c7:#9aa0a6; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--bg); color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif; }
h1, p, li, dd, td.l, td.name, .text, .tile, .fun span, .legend { overflow-wrap:anywhere; }
main { max-width:1080px; margin:0 auto; padding:24px 20px 60px; }
h1 { font-size:26px; line-height:1.2; margin:0 0 4px; } h2 { font-size:19px; margin:0 0 4px; }
h3 { font-size:15px; margin:18px 0 6px; }
p { margin:6px 0; max-width:76ch; } .soft, caption, .note { color:var(--soft); } .note { font-size:13.5px; }
section { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:18px 20px; margin:16px 0; }
.lead { font-size:17px; margin:10px 0; padding-left:20px; max-width:80ch; } .lead li { margin:4px 0; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(112px,1fr)); gap:10px; margin:14px 0 0; }
.tile { background:var(--card); border:1px solid var(--line); border-radius:10px; padding:10px 12px; }
.tile b { display:block; font-size:21px; line-height:1.25; font-variant-numeric:tabular-nums; }
.tile span { color:var(--soft); font-size:13px; }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums; margin-top:8px; }
th { text-align:right; font-weight:600; color:var(--soft); font-size:12.5px; vertical-align:bottom; }
th, td { padding:4px 7px; border-bottom:1px solid var(--line); } td { text-align:right; }
th.l, td.l { text-align:left; } td.name { text-align:left; min-width:210px; line-height:1.3; }
td.name small { display:block; color:var(--soft); font-size:12px; }
tr.gap td { text-align:center; color:var(--soft); font-size:13px; }
th button { all:unset; cursor:pointer; font:inherit; } th button:focus-visible { outline:2px solid var(--accent); }
th button { text-decoration:underline dotted 1px; text-underline-offset:3px; }
th[aria-sort=ascending] button::after { content:"\\2191"; } th[aria-sort=descending] button::after { content:"\\2193"; }
td.bar { width:26%; min-width:110px; }
.iv { position:relative; height:16px; background:var(--track); border-radius:3px; }
.iv i { position:absolute; top:6px; height:4px; border-radius:2px; background:var(--accent); opacity:.5; }
.iv b { position:absolute; top:3px; width:10px; height:10px; margin-left:-5px; border-radius:50%;
  background:var(--accent); }
.iv u { position:absolute; top:0; bottom:0; width:1px; background:var(--soft); opacity:.6; }
.fun { display:grid; grid-template-columns:minmax(110px,190px) 1fr minmax(90px,auto); gap:6px 10px; align-items:center;
  font-variant-numeric:tabular-nums; margin-top:8px; }
.fun div { background:var(--track); border-radius:4px; height:20px; }
.fun i { display:block; height:100%; border-radius:4px;
  background:var(--accent); min-width:2px; } .fun span:nth-child(3n) { text-align:right; }
svg { display:block; width:100%; max-width:720px; height:auto; }
svg text { fill:var(--ink); font-size:13px; } svg .ax { fill:var(--soft); }
svg .grid { stroke:var(--line); stroke-width:1; } svg .front { fill:none; stroke:var(--ink); stroke-width:1.3;
  stroke-dasharray:5 4; opacity:.7; } svg .err { opacity:.35; stroke-width:1.5; } svg .num { font-weight:700; }
.legend { display:flex; flex-wrap:wrap; gap:4px 16px; margin:8px 0; font-size:13.5px; }
.legend i { display:inline-block;
  width:11px; height:11px; border-radius:50%; margin-right:6px; }
.two { display:grid; grid-template-columns:minmax(0,3fr) minmax(0,2fr); gap:8px 24px; align-items:start; }
.heat { table-layout:fixed; font-size:12px; } .heat td, .heat th { padding:2px 1px; text-align:center; border:1px solid
  var(--card); } .heat th.l { width:130px; text-align:left; font-weight:400; color:var(--ink); }
.scroll { overflow-x:auto; } .scroll table { width:auto; min-width:100%; font-size:13px; }
.scroll th.name, .scroll td.name { position:sticky; left:0; background:var(--card); z-index:1; min-width:180px;
  max-width:260px; } .scroll td.name small { display:inline; } .scroll td.name small + small { display:block; }
.scroll th.cell { max-width:90px; padding:4px 2px; font-size:11.5px; overflow-wrap:anywhere; text-align:center; }
.scroll td.cell { padding:1px; text-align:center; } .scroll tr.gap td { text-align:left; }
.cell div { padding:2px 4px; border-radius:4px; line-height:1.25; min-width:60px; }
.cell small { display:block; font-size:11px; white-space:nowrap; opacity:.8; }
.cell .up { background:color-mix(in srgb,var(--good) var(--v),var(--card)); }
.cell .dn { background:color-mix(in srgb,var(--bad) var(--v),var(--card)); }
.bins { display:flex; align-items:flex-end; gap:1px; height:24px; width:104px; border-bottom:1px solid var(--soft); }
.bins i { flex:1; background:var(--accent); }
.none { color:var(--soft); font-style:italic; }
details { margin-top:10px; } summary { cursor:pointer; color:var(--accent); }
.sample { border-top:1px solid var(--line); padding:12px 0; } .sample:first-of-type { border-top:0; }
.text { white-space:pre-wrap; background:var(--track); border-radius:8px; padding:9px 12px; margin:6px 0; }
.text.answer { border-left:3px solid var(--good); } .text.worst { border-left:3px solid var(--bad); }
dl { display:grid; grid-template-columns:auto 1fr; gap:3px 16px; margin:8px 0; } dt { color:var(--soft); }
dd { margin:0; }
code { font:12.5px ui-monospace,monospace; }
@media (max-width:760px) { main { padding:14px 10px 40px; } section { padding:14px 12px; } .two { display:block; }
  .wide { display:none; } h1 { font-size:22px; } .lead { font-size:15.5px; } th, td { padding:4px 4px; }
  svg text { font-size:21px; } .fun { grid-template-columns:92px 1fr 84px; font-size:13.5px; }
  .heat th.l { width:92px; }
  .heat td { font-size:0; height:17px; } .heat th { font-size:10px; } td.bar { min-width:70px; width:30%; }
  td.name { min-width:0; }
  td.name small, .scroll td.name small + small { display:none; }
  .scroll th.name, .scroll td.name { min-width:104px; max-width:112px; }
  .cell div { min-width:54px; padding:2px 1px; }
  table { font-size:13.5px; } dl { display:block; } dd { margin-bottom:8px; } }
"""

JS = """
document.querySelectorAll("table.sortable").forEach(table => {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((th, column) => {
    const button = document.createElement("button");
    button.textContent = th.textContent;
    th.replaceChildren(button);
    button.onclick = () => {
      const up = th.getAttribute("aria-sort") === "descending";
      heads.forEach(h => h.removeAttribute("aria-sort"));
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (x, y) => {
        const a = value(x), b = value(y);
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
        return up ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    };
  });
});
"""
