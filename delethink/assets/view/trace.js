// One or two traces. Only the pages near the window are in the document; the others are empty boxes
// of their last known height, so that a trace of any length has a bounded number of nodes.
import { ask, button, element, exportHref, go, link } from "./base.js";
import { groupHref } from "./list.js";

const PIXELS_PER_TOKEN = 0.9; // of a page that was not shown yet
const MARGIN = "600px";

class Pane {
  constructor(name, number) {
    this.name = name;
    this.number = number;
    this.element = document.createElement("article");
    this.element.className = "trace";
    this.mounted = new Map();
    this.observer = new IntersectionObserver((entries) => this.intersect(entries), {
      rootMargin: `${MARGIN} 0px`,
    });
  }

  async load() {
    const parameters = { name: this.name, pane: this.number };
    this.found = await (await ask("api/trace", parameters)).json();
    const head = element("div");
    head.innerHTML = this.found.head; // escaped by the server, and without scripts
    head.querySelector(".map").addEventListener("click", (event) => {
      const row = event.target.closest("[data-chunk]");
      if (row) this.goto(Number(row.dataset.chunk));
    });
    const tools = this.tools();
    this.boxes = this.found.pages.map(({ weight }, index) => {
      const box = document.createElement("div");
      box.className = "page";
      box.dataset.index = index;
      box.style.minHeight = `${Math.max(40, weight * PIXELS_PER_TOKEN)}px`;
      return box;
    });
    this.element.replaceChildren(tools, head, ...this.boxes);
    this.boxes.forEach((box) => this.observer.observe(box));
  }

  tools() {
    return element(
      "div",
      "tools",
      button("← back", () => document.dispatchEvent(new CustomEvent("back"))),
      button("next chunk", () => this.step(1)),
      button("previous chunk", () => this.step(-1)),
      ...(this.found.answer_page === null ? [] : [button("answer", () => this.answer())]),
      link("all traces of the problem", groupHref(this.found.group)),
      link("save as a page", exportHref([this.name])),
    );
  }

  intersect(entries) {
    for (const { target, isIntersecting } of entries) {
      const index = Number(target.dataset.index);
      if (isIntersecting) this.mount(index);
      else if (this.mounted.has(index)) {
        target.style.minHeight = `${target.offsetHeight}px`;
        target.replaceChildren();
        this.mounted.delete(index);
      }
    }
  }

  mount(index) {
    if (!this.mounted.has(index)) {
      this.mounted.set(index, this.fill(index));
    }
    return this.mounted.get(index);
  }

  async fill(index) {
    const box = this.boxes[index];
    try {
      const response = await ask("api/page", { name: this.name, n: index });
      const text = await response.text();
      if (!this.mounted.has(index)) return;
      box.innerHTML = text; // escaped by the server, and without scripts
      box.style.minHeight = "";
    } catch (error) {
      box.textContent = error.message;
    }
  }

  // Scroll to an element of a page, which may not be in the document yet.
  async reveal(page, selector) {
    const box = this.boxes[page];
    box.scrollIntoView();
    await this.mount(page);
    (box.querySelector(selector) || box).scrollIntoView({ block: "start" });
  }

  // One after the other, as keys come faster than pages.
  step(by) {
    this.moving = (this.moving || Promise.resolve()).then(() => this.move(by));
    return this.moving;
  }

  // Find the chunk at the top of the window, and scroll to the one some steps away.
  async move(by) {
    const heads = this.found.pages.map(({ chunk }) => chunk);
    const top = document.querySelector("header").offsetHeight + 70;
    let here = 0;
    for (const box of this.boxes) {
      if (box.getBoundingClientRect().top > top) break;
      here = heads[Number(box.dataset.index)] - (Number(box.dataset.index) === 0 ? 1 : 0);
      for (const head of box.querySelectorAll("h2[id^=chunk-]"))
        if (head.getBoundingClientRect().top <= top) here = Number(head.id.slice(6));
    }
    await this.goto(Math.max(1, Math.min(this.found.chunks, here + by)));
  }

  async goto(wanted) {
    const heads = this.found.pages.map(({ chunk }) => chunk);
    // The heading of a chunk is on the last page that begins before it, or on a page of its own.
    let page = heads.findIndex((chunk) => chunk >= wanted);
    if (page < 0) page = heads.length;
    const selector = `#chunk-${wanted}`;
    for (const candidate of [Math.max(0, page - 1), Math.min(page, heads.length - 1)]) {
      await this.mount(candidate);
      if (this.boxes[candidate].querySelector(selector)) return this.reveal(candidate, selector);
    }
  }

  answer() {
    if (this.found.answer_page !== null) this.reveal(this.found.answer_page, ".answer");
  }

  shade() {
    const choices = [...this.element.querySelectorAll(".shading input")];
    const now = choices.findIndex((choice) => choice.checked);
    if (choices.length) choices[(now + 1) % choices.length].checked = true;
  }

  close() {
    this.observer.disconnect();
    this.element.remove();
  }
}

export class Traces {
  constructor(home, list) {
    this.home = home;
    this.list = list;
    this.panes = [];
    this.before = "#list";
    document.addEventListener("back", () => this.back());
  }

  back() {
    location.hash = this.before;
  }

  clear() {
    this.panes.forEach((pane) => pane.close());
    this.panes = [];
  }

  async show(parameters) {
    this.clear();
    const names = [parameters.get("name"), parameters.get("with")].filter(Boolean);
    this.home.classList.toggle("two", names.length > 1);
    this.panes = names.map((name, number) => new Pane(name, number));
    const panes = this.panes;
    this.home.replaceChildren(...panes.map((pane) => pane.element));
    scrollTo(0, 0);
    await Promise.all(panes.map((pane) => pane.load()));
    this.home.focus({ preventScroll: true });
  }

  key(event) {
    const turn = (step) => {
      const name = this.list.neighbour(this.panes[0]?.name, step);
      if (name) go("trace", { name });
    };
    const each = (action) => this.panes.forEach(action);
    const actions = {
      j: () => turn(1),
      k: () => turn(-1),
      n: () => this.panes[0]?.step(1),
      p: () => this.panes[0]?.step(-1),
      a: () => each((pane) => pane.answer()),
      s: () => each((pane) => pane.shade()),
      o: () => this.panes[0]?.found && go("group", { group: this.panes[0].found.group }),
      x: () => this.home.querySelector('a[href^="api/export"]')?.click(),
    };
    if (!actions[event.key]) return false;
    actions[event.key]();
    return true;
  }
}
