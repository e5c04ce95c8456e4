"use strict";
// The findings on top: a press on one shows the steps around it.

function showFindings(view) {
  const place = document.getElementById("findings");
  const all = view.runs.flatMap((run) => run.findings.map((finding) => ({ run, finding })));
  const none = view.runs.some((run) => run.count) ? "No finding" : "No step yet";
  const heading = all.length ? `${all.length} ${all.length === 1 ? "finding" : "findings"}` : none;
  const isOne = view.runs.length === 1;
  const problems = view.runs.filter((run) => run.problem).map((run) => made("p", { className: "problem" }, [`${run.name}: ${run.problem}`]));
  refill(place, [made("h2", {}, [heading]), ...problems, ...all.map((one) => findingOf(view, one, isOne))]);
}

function findingOf(view, { run, finding }, isOne) {
  const steps = finding.since === finding.step ? `step ${finding.step}` : `steps ${finding.since} to ${finding.step}`;
  const button = made("button", { type: "button" }, [
    made("span", { className: "number" }, [String(finding.number)]),
    made("strong", {}, [finding.rule]),
    made("span", {}, [`${finding.severity}, ${steps}${isOne ? "" : `, ${run.name}`}`]),
  ]);
  button.addEventListener("click", () => {
    view.look(run, finding);
    document.getElementById(`chart-${chartOfRule(finding.rule)}`)?.scrollIntoView({ block: "center" });
  });
  const texts = [["", finding.evidence], ["Cause: ", finding.cause], ["To do: ", finding.remedy]];
  const article = made("article", { className: "finding" }, [
    button, ...texts.map(([label, text]) => made("p", {}, [made("b", {}, [label]), text])),
    made("p", { className: "quiet" }, [`Rule: ${finding.reference}`]),
  ]);
  article.dataset.severity = finding.severity;
  return article;
}
