// The list of traces: sorted, filtered and searched by the server, a page at a time.
import { ask, button, element, go, link, shown } from "./base.js";

const COLUMNS = [
  ["step", "step", ""],
  ["problem", "problem", "text"],
  ["reward", "reward", "number"],
  ["stop", "stop", ""],
  ["chunks", "chunks", "number"],
  ["length", "tokens", "number"],
];
const GROUP_COLUMNS = [
  ["step", "first step", ""],
  ["problem", "problem", "text"],
  [null, "traces", "number"],
  ["reward", "mean reward", "number"],
  [null, "best", "number"],
  [null, "worst", "number"],
  ["length", "mean tokens", "number"],
];
const SEARCH_DELAY_MS = 250;

export const groupHref = (group) => `#group?${new URLSearchParams({ group })}`;

export class List {
  constructor(byId) {
    this.byId = byId;
    this.names = []; // of the shown page, for the neighbours of a trace
    this.rows = [];
    this.current = 0;
    this.marked = null;
    this.last = "";
    const change = () => this.change({ offset: 0 });
    for (const id of ["stop", "reward", "by"]) byId(id).addEventListener("change", change);
    let timer;
    byId("q").addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(change, SEARCH_DELAY_MS);
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("clear").addEventListener("click", () => go("list", {}));
    byId("previous").addEventListener("click", () => this.turn(-1));
    byId("next").addEventListener("click", () => this.turn(1));
  }

  // Write the filters into the address, which shows them.
  change(others) {
    const parameters = Object.fromEntries(this.parameters);
    for (const id of ["q", "stop", "reward"]) parameters[id] = this.byId(id).value;
    parameters.by = this.byId("by").checked ? "problem" : "";
    if (this.byId("by").checked) parameters.group = "";
    Object.assign(parameters, others);
    for (const [name, value] of Object.entries(parameters)) if (!value) delete parameters[name];
    go("list", parameters);
  }

  setStops(stops) {
    const select = this.byId("stop");
    const known = new Set([...select.options].map((option) => option.value));
    for (const stop of stops) if (!known.has(stop)) select.add(new Option(stop, stop));
    if (this.parameters) select.value = this.parameters.get("stop") || "";
  }

  async show(parameters) {
    this.parameters = parameters;
    this.last = location.hash;
    for (const id of ["q", "stop", "reward"]) {
      const control = this.byId(id);
      if (control !== document.activeElement) control.value = parameters.get(id) || "";
    }
    this.byId("by").checked = parameters.get("by") === "problem";
    this.byId("clear").hidden = ![...parameters.keys()].some((key) => key !== "sort" && key !== "desc");
    await this.reload();
    this.byId("table").tBodies[0].rows[this.current]?.scrollIntoView({ block: "nearest" });
  }

  async reload() {
    const parameters = this.parameters;
    const found = await (await ask("api/list", parameters)).json();
    if (parameters !== this.parameters) return; // a newer question is on its way
    this.found = found;
    this.rows = found.groups || found.rows;
    this.names = found.rows ? found.rows.map((row) => row.name) : this.names;
    this.current = Math.min(this.current, Math.max(0, this.rows.length - 1));
    this.draw();
  }

  draw() {
    const { found } = this;
    const grouped = Boolean(found.groups);
    const last = Math.min(found.offset + this.rows.length, found.total);
    const what = grouped ? "problems" : "traces";
    this.byId("count").textContent = found.total
      ? `${(found.offset + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${found.total.toLocaleString("en")} ${what}`
      : `no ${what} to show`;
    if (found.note) this.byId("count").append(` · ${found.note}`);
    this.byId("previous").disabled = found.offset === 0;
    this.byId("next").disabled = last >= found.total;
    const columns = grouped ? GROUP_COLUMNS : COLUMNS;
    this.byId("table").tHead.replaceChildren(this.heads(columns));
    this.byId("table").tBodies[0].replaceChildren(
      ...this.rows.map((row, index) => (grouped ? this.group(row, index) : this.row(row, index))),
    );
  }

  heads(columns) {
    const line = document.createElement("tr");
    const sort = this.parameters.get("sort") || "step";
    const down = this.parameters.get("desc") === "1";
    const ofEvaluation = this.rows.some((row) => row.sample != null);
    for (const [key, name, className] of columns) {
      const text = key === "step" && ofEvaluation ? "setting · sample" : name;
      let content = text;
      const head = element("th", className);
      head.scope = "col";
      if (key) {
        content = button(text + (key === sort ? (down ? " ↓" : " ↑") : ""), () =>
          this.change({ sort: key, desc: key === sort && !down ? "1" : "", offset: 0 }),
        );
        head.setAttribute("aria-sort", key !== sort ? "none" : down ? "descending" : "ascending");
      }
      head.append(content);
      line.append(head);
    }
    return line;
  }

  line(index, href, cells) {
    const line = document.createElement("tr");
    line.classList.toggle("current", index === this.current);
    line.append(...cells);
    line.addEventListener("click", (event) => {
      this.current = index;
      if (!event.target.closest("a")) location.hash = href;
    });
    return line;
  }

  row(row, index) {
    const href = this.href(row.name);
    const step = row.sample === null ? row.step : `${row.step} · ${row.sample}`;
    const good = row.reward === null ? "" : row.reward >= 1 ? " right" : " wrong";
    const line = this.line(index, href, [
      element("td", "", link(step, href)),
      element("td", "text", row.problem),
      element("td", `number${good}`, shown(row.reward)),
      element("td", "", row.stop),
      element("td", "number", shown(row.chunks)),
      element("td", "number", shown(row.length)),
    ]);
    line.classList.toggle("marked", row.name === this.marked);
    line.title = row.error || "";
    return line;
  }

  group(group, index) {
    const href = groupHref(group.group);
    const one = (name, reward) =>
      name ? link(shown(reward), `#trace?${new URLSearchParams({ name })}`) : "none";
    return this.line(index, href, [
      element("td", "", link(group.step, href)),
      element("td", "text", group.problem),
      element("td", "number", shown(group.traces)),
      element("td", "number", shown(group.reward)),
      element("td", "number", one(group.best, group.best_reward)),
      element("td", "number", one(group.worst, group.worst_reward)),
      element("td", "number", shown(Math.round(group.length))),
    ]);
  }

  href(name) {
    const parameters = { name };
    if (this.marked && this.marked !== name) parameters.with = this.marked;
    return `#trace?${new URLSearchParams(parameters)}`;
  }

  // Return the name of the trace some rows away in the shown page.
  neighbour(name, step) {
    const index = this.names.indexOf(name);
    return index < 0 ? undefined : this.names[index + step];
  }

  move(step) {
    const lines = this.byId("table").tBodies[0].rows;
    if (!lines.length) return;
    lines[this.current]?.classList.remove("current");
    this.current = Math.max(0, Math.min(lines.length - 1, this.current + step));
    lines[this.current].classList.add("current");
    lines[this.current].scrollIntoView({ block: "nearest" });
  }

  turn(step) {
    const offset = Math.max(0, this.found.offset + step * this.found.page);
    if (offset >= this.found.total) return;
    this.current = 0;
    this.change({ offset });
  }

  mark(name) {
    this.marked = this.marked === name ? null : name;
  }

  // The best and the worst trace of a problem, side by side.
  async pair(group) {
    const found = await (await ask("api/list", { by: "problem", group })).json();
    const { best, worst } = found.groups[0] || {};
    if (best && best !== worst) go("trace", { name: best, with: worst });
  }

  key(event) {
    const row = this.rows[this.current];
    const actions = {
      j: () => this.move(1),
      ArrowDown: () => this.move(1),
      k: () => this.move(-1),
      ArrowUp: () => this.move(-1),
      "/": () => this.byId("q").focus(),
      g: () => {
        this.byId("by").checked = !this.byId("by").checked;
        this.change({ offset: 0 });
      },
      "[": () => this.turn(-1),
      "]": () => this.turn(1),
      b: () => row && this.pair(row.group),
      o: () => row && go("group", { group: row.group }),
      m: () => {
        if (!row?.name) return;
        this.mark(row.name);
        this.draw();
      },
    };
    if (event.key === "Enter" && !event.target.closest("a, button") && row) {
      if (row.name) location.hash = this.href(row.name);
      else this.byId("table").tBodies[0].rows[this.current].querySelector("a").click();
      return true;
    }
    if (!actions[event.key]) return false;
    actions[event.key]();
    return true;
  }
}
