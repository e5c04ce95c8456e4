// Requests to the server, and its streamed answers as tokens.

export class ServerError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

/** A GET, or a POST of `body`. Throws ServerError, and an AbortError if `signal` says so. */
export async function ask(path, key, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  const response = await reached(fetch(path, options));
  if (!response.ok) throw await refusal(response);
  return response;
}

async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached.");
  }
}

async function refusal(response) {
  const text = await response.text();
  let said = text;
  try {
    said = JSON.parse(text).error.message;
  } catch {
    // A proxy's answer need not be JSON: its text is shown.
  }
  return new ServerError(`${said || response.statusText} (${response.status})`, response.status);
}

/** The choices of a streamed answer, an array for what arrives together. Throws as `ask`. */
export async function* choices(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reached(reader.read());
    if (done) throw new ServerError("The server ended the answer before it was whole.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    const data = lines.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
    const events = data.filter((line) => line !== "[DONE]").map((line) => JSON.parse(line));
    yield events.flatMap((event) => event.choices ?? []);
    const failed = events.find((event) => event.error);
    if (failed) throw new ServerError(failed.error.message);
    if (data.includes("[DONE]")) return;
  }
}

/**
 * The tokens of a streamed choice: `text`, empty for a token that ends the answer or completes no character; `name`, how
 * the token is spelled; `logprob`; `likeliest`, names with their log-probabilities; `experts` by layer, or null.
 */
export function tokensOf(choice) {
  const tokens = choice.delta ? ofChat(choice) : ofCompletion(choice);
  return tokens.map((token, index) => ({ ...token, experts: choice.experts[index] }));
}

function ofCompletion({ text, logprobs }) {
  const characters = [...text]; // offsets count code points
  const begin = logprobs.text_offset[0];
  return logprobs.text_offset.map((offset, index) => ({
    text: characters.slice(offset - begin, (logprobs.text_offset[index + 1] ?? Infinity) - begin).join(""),
    name: logprobs.tokens[index],
    logprob: logprobs.token_logprobs[index],
    likeliest: Object.entries(logprobs.top_logprobs[index]),
  }));
}

function ofChat({ delta, logprobs }) {
  let rest = delta.content;
  return logprobs.content.map(({ token, logprob, top_logprobs }, index) => {
    const isLast = index + 1 === logprobs.content.length;
    const text = isLast ? rest : rest.startsWith(token) ? token : "";
    rest = rest.slice(text.length);
    return { text, name: token, logprob, likeliest: top_logprobs.map((other) => [other.token, other.logprob]) };
  });
}
