// What every page of the console does: sends the page's token, says when the gateway is away, copies texts.

let token = document.querySelector('meta[name="swarm-token"]').content;

/** POST to the gateway's API with the page's token; resolves to the Response. */
export function post(path, body, signal) {
  return fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Swarm-Token": token },
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
  });
}

/** The sentence in an error response. */
export async function reason(response) {
  try {
    const said = await response.json();
    return said.error.message;
  } catch {
    return `The gateway answered ${response.status}.`;
  }
}

document.body.addEventListener("htmx:configRequest", (event) => {
  event.detail.headers["X-Swarm-Token"] = token;
});

// A gateway that was started anew has another token, and knows nobody who signed in before.
async function meetAgain() {
  try {
    const response = await fetch("/api/token");
    if (response.status === 401) location.assign("/sign-in");
    else if (response.ok) token = (await response.json()).token;
  } catch {
    // It is away, as the banner says.
  }
}

const offline = document.getElementById("offline");
document.body.addEventListener("htmx:sseError", () => {
  offline.hidden = false;
  meetAgain();
});
document.body.addEventListener("htmx:sseOpen", async () => {
  if (!offline.hidden) await meetAgain();
  offline.hidden = true;
});

// What is asked by a button gets its answer in #said; htmx puts nothing there where there was none.
function tell(target, text) {
  if (target.id !== "said") return;
  const line = document.createElement("p");
  line.className = "error";
  line.textContent = text;
  target.replaceChildren(line);
}
document.body.addEventListener("htmx:sendError", (event) => tell(event.detail.target, "The gateway does not answer."));
document.body.addEventListener("htmx:responseError", ({ detail: { target, xhr } }) => {
  if (target.id === "log-text") document.getElementById("log").replaceChildren(); // of a peer that is listed no more
  else tell(target, `The gateway answered ${xhr.status}.`);
});

// A log that says nothing new keeps its place; one that is at its end stays there.
document.body.addEventListener("htmx:beforeSwap", (event) => {
  const log = event.detail.target;
  if (log.id !== "log-text") return;
  const fresh = new DOMParser().parseFromString(event.detail.serverResponse, "text/html").getElementById("log-text");
  event.detail.shouldSwap = fresh !== null && fresh.textContent !== log.textContent;
});
document.body.addEventListener("htmx:afterSettle", () => {
  const log = document.getElementById("log-text");
  if (log) log.scrollTop = log.scrollHeight;
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    // Without https elsewhere than on localhost there is no clipboard: mark the text instead.
    getSelection().selectAllChildren(source);
    button.textContent = "Marked";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
