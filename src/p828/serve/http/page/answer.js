// An answer: a list of tokens of which Tab reaches one, and the arrow keys the others.

import { element, levelOf, percent, spelled } from "./detail.js";

export class Answer {
  /** `onShow(index)` is called when a token is pointed at or reached. */
  constructor(onShow) {
    this.tokens = []; // as `tokensOf` gives them
    this.text = "";
    this.onShow = onShow;
    this.list = element("div", { className: "answer", role: "listbox", ariaLabel: "Tokens of the answer" });
    this.list.addEventListener("focusin", ({ target }) => this.reach(target));
    // Not pointerover, which also comes when a growing answer moves under a pointer at rest.
    this.list.addEventListener("pointermove", ({ target }) => this.show(tokenAt(target)));
    this.list.addEventListener("click", ({ target }) => tokenAt(target)?.focus());
    this.list.addEventListener("keydown", (event) => this.move(event));
  }

  add(tokens) {
    this.list.append(...tokens.map(optionOf));
    if (!this.tokens.length) this.list.firstElementChild.tabIndex = 0;
    this.tokens.push(...tokens);
    this.text += tokens.map((token) => token.text).join("");
  }

  reach(option) {
    for (const other of this.list.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    option.tabIndex = 0;
    this.show(option);
    option.scrollIntoView({ block: "nearest" });
  }

  show(option) {
    if (!option || option.ariaSelected === "true") return;
    for (const other of document.querySelectorAll(".token[aria-selected='true']")) other.ariaSelected = "false";
    option.ariaSelected = "true";
    this.onShow([...this.list.children].indexOf(option));
  }

  move(event) {
    const from = tokenAt(event.target);
    const goal = {
      ArrowLeft: () => from.previousElementSibling,
      ArrowRight: () => from.nextElementSibling,
      ArrowUp: () => inNextLine(from, "previousElementSibling"),
      ArrowDown: () => inNextLine(from, "nextElementSibling"),
      Home: () => this.list.firstElementChild,
      End: () => this.list.lastElementChild,
    }[event.key];
    if (!goal || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    goal()?.focus();
  }
}

const tokenAt = (target) => target.closest(".token");

function optionOf({ text, name, logprob }) {
  const p = Math.exp(logprob);
  const option = element("span", { className: "token", role: "option", tabIndex: -1, ariaSelected: "false" });
  text.split("\n").forEach((line, index) => {
    if (index) option.append(element("i", { className: "break" }), "\n"); // the style makes the break visible
    option.append(line);
  });
  option.dataset.level = levelOf(p);
  option.ariaLabel = `${text.trim() ? text : spelled(text || name)}, ${percent(p)}`;
  option.setAttribute("aria-describedby", "likeliest");
  return option;
}

/** The nearest token in the line above or below, in the direction of `sibling`; null if there is no such line. */
function inNextLine(from, sibling) {
  const place = (option) => option.getClientRects()[0] ?? option.getBoundingClientRect();
  const start = place(from);
  let nearest = null;
  let nearestPlace = null;
  for (let option = from[sibling]; option; option = option[sibling]) {
    const { top, left, height } = place(option);
    if (Math.abs(top - start.top) < height / 2) continue;
    if (nearest && Math.abs(top - nearestPlace.top) >= height / 2) break;
    if (!nearest || Math.abs(left - start.left) < Math.abs(nearestPlace.left - start.left)) {
      [nearest, nearestPlace] = [option, { top, left }];
    }
  }
  return nearest;
}
