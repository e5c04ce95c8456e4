"use strict";
// What the runs were: command, versions, machine, plan and reality, settings and where they differ.

function showAbout(view) {
  const { runs } = view;
  const names = ["", ...runs.map((run) => run.name)];
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const rowOf = (key) => [key, ...runs.map((run) => run.settings[key] ?? "–")];
  const differing = keys.filter((key) => new Set(rowOf(key).slice(1)).size > 1);
  const aboutKeys = [...new Set(runs.flatMap((run) => Object.keys(run.about)))];
  const about = aboutKeys.map((key) => [key, ...runs.map((run) => run.about[key] ?? "–")]);
  const parts = [
    made("h2", {}, ["Command, data and machine"]), tableOf(names, about),
    ...(runs.length > 1 ? [made("h2", {}, ["What differs"]), tableOf(names, [["rows trained on", ...view.sameRows], ...differing.map(rowOf)])] : []),
    ...(runs.length > 1 && !differing.length ? [made("p", {}, ["No setting differs."])] : []),
    ...runs.flatMap((run) => planOf(run, runs.length === 1)),
    ...runs.filter((run) => run.events.length).flatMap((run) => [
      made("h2", {}, [runs.length === 1 ? "Events" : `Events: ${run.name}`]),
      tableOf(["step", "", ""], run.events.map(({ step, event, text }) => [String(step), event, text])),
    ]),
    made("h2", {}, ["Configuration"]),
    made("details", {}, [made("summary", {}, [`${keys.length} settings`]), tableOf(names, keys.map(rowOf))]),
  ];
  refill(document.getElementById("about"), parts);
}

function planOf(run, isOne) {
  const title = made("h2", {}, [isOne ? "Plan and reality" : `Plan and reality: ${run.name}`]);
  const rows = run.plan.rows.map((row) => [row.name, row.planned, row.real, row.share]);
  const remark = made("p", { className: "quiet" }, [run.plan.remark]);
  return rows.length ? [title, remark, tableOf(["", "planned", "so far", "of it"], rows)] : [title, remark];
}

function tableOf(head, rows) {
  const line = (cells, tag) => made("tr", {}, cells.map((cell, i) => made(i ? tag : "th", {}, [cell])));
  const table = made("table", {}, [made("thead", {}, [line(head, "th")]), made("tbody", {}, rows.map((row) => line(row, "td")))]);
  return made("div", { className: "wide" }, [table]);
}
