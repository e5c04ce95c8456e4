// The page of `p828 serve`. What a model or the server says enters the document as text, never as markup.

import { Answer } from "./answer.js";
import { detailOf, element } from "./detail.js";
import { ServerError, ask, choices, tokensOf } from "./server.js";

const ALTERNATIVES = 5;
const WAITING = "waiting for the first token …";

let model = null; // as /v1/models has it
let messages = []; // the conversation so far
let running = null; // the AbortController of the answer on its way
let following = true; // whether the end of the answer stays in sight
let scrolledTo = 0;

const at = (id) => document.getElementById(id);
const isChat = () => at("form").mode.value === "chat";

async function findModel() {
  const response = await ask("v1/models", at("key").value);
  model = (await response.json()).data[0];
  at("model").textContent = `${model.id}, ${model.max_model_len.toLocaleString("en")} tokens of context`;
  document.title = `${model.id} – p828`;
  at("key-row").hidden = true;
  at("modes").hidden = !model.chat;
  if (model.chat) at("form").mode.value = "chat";
}

// ---- asking ----

async function send() {
  if (running || !hasValidSettings()) return;
  const prompt = at("prompt").value;
  if (isChat() && !prompt.trim()) {
    showError("A message has at least one character.");
    return;
  }
  showError("");
  setRunning(new AbortController());
  let turn = null;
  try {
    if (!model) await findModel();
    turn = newTurn(prompt);
    const [path, request] = requestOf(prompt);
    const reason = await stream(turn.answer, path, request);
    turn.end.textContent = endOf(reason, turn.answer.tokens.length, request.max_tokens);
  } catch (error) {
    fail(error, turn);
  } finally {
    setRunning(null);
    if (turn?.chat && turn.end.isConnected) keep(prompt, turn); // unless forgotten meanwhile
  }
}

function requestOf(prompt) {
  const number = (id) => Number(at(id).value);
  const request = { model: model.id, stream: true, experts: true };
  for (const id of ["max_tokens", "temperature", "top_p"]) request[id] = number(id);
  if (at("seed").value) request.seed = number("seed");
  if (!isChat()) return ["v1/completions", { ...request, prompt, logprobs: ALTERNATIVES }];
  const said = [...messages, { role: "user", content: prompt }];
  return ["v1/chat/completions", { ...request, messages: said, logprobs: true, top_logprobs: ALTERNATIVES }];
}

/** Why the answer ended. */
async function stream(answer, path, request) {
  const began = performance.now();
  let [first, reason] = [null, null];
  for await (const arrived of choices(await ask(path, at("key").value, request, running.signal))) {
    const tokens = arrived.flatMap(tokensOf);
    reason = arrived.find((choice) => choice.finish_reason)?.finish_reason ?? reason;
    if (!tokens.length) continue;
    first ??= { time: performance.now(), count: tokens.length };
    answer.add(tokens);
    if (following) requestAnimationFrame(scrollToEnd);
    showSpeed(answer.tokens.length, first, began);
  }
  return reason;
}

function endOf(reason, count, most) {
  if (reason === "stop") return "The model ended its answer.";
  return count < most ? "Cut off: the model's context is full." : "Cut off after max tokens.";
}

function fail(error, turn) {
  const stopped = error.name === "AbortError";
  if (turn) turn.end.textContent = stopped ? "Stopped." : "Ended by an error.";
  if (!stopped) showFailure(error);
}

// ---- what is shown ----

function newTurn(prompt) {
  const chat = isChat();
  if (!messages.length) at("answers").replaceChildren();
  const answer = new Answer((index) => showDetail(answer, index));
  const asked = element("p", { className: "asked", textContent: prompt });
  const end = element("p", { className: "end" });
  at("answers").append(element("article", { className: chat ? "turn chat" : "turn" }, asked, answer.list, end));
  if (chat) at("prompt").value = "";
  closeDetail();
  following = true;
  return { answer, end, chat };
}

/** Adds a turn to the conversation; a message without an answer goes back to where it was written. */
function keep(prompt, { answer, end }) {
  if (answer.text) {
    messages.push({ role: "user", content: prompt }, { role: "assistant", content: answer.text });
    at("forget").hidden = false;
  } else {
    at("prompt").value ||= prompt;
    end.parentElement.remove();
  }
}

function forget() {
  messages = [];
  at("answers").replaceChildren();
  at("forget").hidden = true;
  closeDetail();
}

function showDetail(answer, index) {
  const place = `token ${index + 1} of ${answer.tokens.length}`;
  at("token").replaceChildren(...detailOf(answer.tokens[index], place, model.n_routed_experts));
  at("detail").classList.add("open");
}

function closeDetail() {
  at("detail").classList.remove("open");
  at("token").replaceChildren();
}

function showSpeed(count, first, began) {
  const seconds = (performance.now() - first.time) / 1000;
  const rate = count > first.count && seconds > 0 ? `${((count - first.count) / seconds).toFixed(1)} tokens/s, ` : "";
  at("speed").textContent = `${count} tokens, ${rate}first after ${(first.time - began).toFixed(0)} ms`;
}

function scrollToEnd() {
  at("answers").scrollTo(0, at("answers").scrollHeight);
}

function setRunning(controller) {
  const focused = document.activeElement;
  running = controller;
  at("send").disabled = running !== null;
  at("stop").disabled = running === null;
  if (running && focused === at("send")) at("stop").focus();
  if (!running && focused === at("stop")) at("prompt").focus();
  if (running) at("speed").textContent = WAITING;
  else if (at("speed").textContent === WAITING) at("speed").textContent = "";
  at("status").textContent = running ? "Answering" : `Done: ${at("speed").textContent}`;
}

function hasValidSettings() {
  const wrong = [...at("settings").querySelectorAll("input")].find((input) => !input.checkValidity());
  if (wrong) at("settings").open = true;
  wrong?.reportValidity();
  return !wrong;
}

function showError(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function showFailure(error) {
  if (!model) at("model").textContent = "";
  if (error.status === 401 && at("key-row").hidden) {
    at("key-row").hidden = false;
    at("key").focus();
    showError("The server asks for its key.");
  } else {
    showError(error instanceof ServerError ? error.message : `The page failed: ${error}`);
  }
}

// ---- keys and buttons ----

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("stop").addEventListener("click", () => running?.abort());
at("forget").addEventListener("click", () => {
  running?.abort();
  forget();
  at("prompt").focus();
});
at("modes").addEventListener("change", () => {
  running?.abort();
  forget();
});
at("close").addEventListener("click", () => {
  closeDetail();
  at("prompt").focus();
});
at("key").addEventListener("change", () => findModel().then(() => showError(""), showFailure));
at("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // which would send the prompt, too
  at("prompt").focus();
});
at("answers").addEventListener("scroll", ({ target }) => {
  const isAtEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40;
  following = isAtEnd || (following && target.scrollTop >= scrolledTo); // a growing answer's end runs ahead
  scrolledTo = target.scrollTop;
});
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    send();
  } else if (event.key === "Escape") {
    if (running) running.abort();
    else at("prompt").focus();
  }
});
at("prompt").focus();
findModel().catch(showFailure);
