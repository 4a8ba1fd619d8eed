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
  return { view: view === "trace" ? "trace" : "list", parameters: new URLSearchParams(query || "") };
}

export function go(view, parameters) {
  location.hash = `${view}?${new URLSearchParams(parameters)}`;
}
