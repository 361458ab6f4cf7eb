// What all pages have: elements, and calls with the key of this tab. Text never becomes markup.

const KEY = "headrace-key";
const WAIT_MS = 10000;

class NoKeyError extends Error {}

function byId(id) {
  return document.getElementById(id);
}

/** An element with properties and children; `class` and attributes with a dash are attributes. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** The JSON that a path answers. Throws NoKeyError where the server wants a key and this tab has none that fits. */
async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const reply = await fetch(path, {
    headers: key ? { authorization: `Bearer ${key}` } : {},
    cache: "no-store",
    credentials: "omit",
    signal: AbortSignal.timeout(WAIT_MS),
  });
  if (reply.status === 401) throw new NoKeyError(key ? "This key does not fit." : "");
  const body = await reply.json();
  if (!reply.ok) throw new Error(`${reply.status}: ${body.message}`);
  return body;
}

/** Show the form that asks for a key, or what is behind it. */
function showKeyForm(isShown, message = "") {
  byId("key").hidden = !isShown;
  byId("page").hidden = isShown;
  byId("forget").hidden = isShown || !sessionStorage.getItem(KEY);
  byId("key-message").textContent = message;
  if (isShown) byId("key-text").focus();
}

/** Call `again` once a key was given. One that is taken back takes all that was seen with it. */
function watchKey(again) {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("key-text").value.trim();
    byId("key-text").value = "";
    if (!/^[\x20-\x7e]+$/.test(text)) {
      showKeyForm(true, "A key is printable ASCII.");
      return;
    }
    sessionStorage.setItem(KEY, text);
    again();
  });
  byId("forget").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    location.reload();
  });
}
