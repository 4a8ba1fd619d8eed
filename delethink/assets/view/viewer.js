// Which view is shown, the keys, and the state of a run that goes on. Texts of a model reach the page
// as text nodes, or as HTML that the server has escaped.
import { address, ask, byId, say } from "./base.js";
import { Group } from "./group.js";
import { List } from "./list.js";
import { Traces } from "./trace.js";

const POLL_MS = 2000;
const list = new List(byId);
const group = new Group(byId("group"), list);
const traces = new Traces(byId("traces"), list);
const views = { list, group, trace: traces };

async function show() {
  say("");
  const { view, parameters } = address();
  byId("list").hidden = view !== "list";
  byId("group").hidden = view !== "group";
  byId("traces").hidden = view !== "trace";
  if (view !== "trace") {
    traces.clear();
    traces.before = location.hash || "#list"; // where Escape leads
  }
  if (view !== "group") group.clear();
  try {
    await views[view].show(parameters);
  } catch (error) {
    say(error.message);
  }
}

let seen = null;
async function poll() {
  try {
    const state = await (await ask("api/state")).json();
    if (byId("message").dataset.lost) {
      say("");
      delete byId("message").dataset.lost;
    }
    byId("run").textContent = state.name;
    document.title = `${state.name} – delethink view`;
    byId("report").hidden = !state.report;
    const parts = [`${state.traces.toLocaleString("en")} traces`];
    if (!state.complete) parts.push("still reading");
    if (state.damaged) parts.push(`${state.damaged.toLocaleString("en")} damaged lines skipped`);
    if (state.unreadable.length) parts.push(`cannot be read: ${state.unreadable.slice(0, 3).join(", ")}`);
    byId("state").textContent = parts.join(" · ");
    if (state.gone) {
      say("The folder has gone: what was read before is still listed, and its traces cannot be opened.");
      byId("message").dataset.lost = "yes";
    }
    list.setStops(state.stops);
    const { view } = address();
    if (seen !== null && seen !== state.version && view !== "trace") await views[view].reload();
    seen = state.version;
  } catch (error) {
    say(error.message);
    byId("message").dataset.lost = "yes";
  }
  setTimeout(poll, seen === null ? 300 : POLL_MS);
}

function help() {
  if (!byId("help").open) byId("help").showModal();
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  const typing = event.target.matches("input:not([type=checkbox]):not([type=radio]), select");
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else views[address().view].back?.();
    return;
  }
  if (typing) return;
  if (event.key === "?") help();
  else if (!views[address().view].key(event)) return;
  event.preventDefault();
});
addEventListener("hashchange", show);
byId("help-button").addEventListener("click", help);
show();
poll();
