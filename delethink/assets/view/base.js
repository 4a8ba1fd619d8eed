// Questions to the server, addresses and messages.
export const byId = (id) => document.getElementById(id);

export async function ask(path, parameters = {}) {
  let response;
  try {
    response = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  } catch {
    throw new Error("the viewer does not answer any more: start delethink view again");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => ({}));
  throw new Error(found.error || `the viewer answered ${response.status}`);
}

export function say(text) {
  byId("message").textContent = text;
  byId("message").hidden = !text;
}

// "#trace?name=...&with=..." or "#list?sort=..."
export function address() {
  const [view, query] = location.hash.slice(1).split(/\?(.*)/s);
  return { view: ["trace", "group"].includes(view) ? view : "list", parameters: new URLSearchParams(query || "") };
}

export function go(view, parameters) {
  location.hash = `${view}?${new URLSearchParams(parameters)}`;
}

export const shown = (value) =>
  typeof value === "number" ? value.toLocaleString("en", { maximumFractionDigits: 3 }) : value ?? "none";

// An element with a class and contents; a string becomes text, never HTML.
export function element(kind, className, ...contents) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  made.append(...contents);
  return made;
}

export function link(text, href, className) {
  const made = element("a", className, text);
  made.href = href;
  return made;
}

export function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

export const exportHref = (names) =>
  `api/export?${new URLSearchParams(names.map((name) => ["name", name]))}`;
