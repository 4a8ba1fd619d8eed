// All traces of a problem beside each other, a page at a time. A card asks for its map when it comes
// near the window.
import { ask, button, element, exportHref, go, link, shown } from "./base.js";

const CARDS = 16; // of a page

export class Group {
  constructor(home, list) {
    this.home = home;
    this.list = list; // has the marked trace, and the neighbours of an opened one
    this.rows = [];
    this.current = 0;
    this.observer = new IntersectionObserver((entries) => this.intersect(entries), {
      rootMargin: "300px 0px",
    });
  }

  clear() {
    this.observer.disconnect();
    this.home.replaceChildren();
    this.cards = [];
    this.group = null;
  }

  async show(parameters) {
    const group = parameters.get("group") || "";
    if (group !== this.last) this.current = 0;
    this.last = this.group = group;
    this.offset = Number(parameters.get("offset")) || 0;
    await this.reload(true);
    scrollTo(0, 0);
    this.home.focus({ preventScroll: true });
    if (this.current) this.move(0);
  }

  async reload(always = false) {
    const { group, offset } = this;
    const parameters = { group, offset, rows: CARDS, sort: "reward", desc: "1" };
    const [found, all] = await Promise.all(
      [parameters, { group, by: "problem" }].map(async (one) => (await ask("api/list", one)).json()),
    );
    if (group !== this.group || offset !== this.offset) return; // another one is shown meanwhile
    const names = found.rows.map((row) => row.name);
    if (!always && names.join("\n") === this.list.names.join("\n")) return;
    this.rows = found.rows;
    this.total = found.total;
    this.list.names = names;
    this.current = Math.max(0, Math.min(this.current, names.length - 1));
    this.draw(all.groups[0]);
  }

  draw(group) {
    this.observer.disconnect();
    this.cards = this.rows.map((row, index) => this.card(row, index));
    const problem = group ? group.problem : "There is no such problem any more.";
    const last = Math.min(this.offset + CARDS, this.total);
    const count = group
      ? `${this.offset + 1}–${last} of ${shown(this.total)} traces · mean reward ${shown(group.reward)}`
      : "no traces to show";
    const turn = (text, by, isPossible) => {
      const made = button(text, () => this.turn(by));
      made.disabled = !isPossible;
      return made;
    };
    const tools = element(
      "div",
      "tools",
      button("← list", () => this.back()),
      button("best and worst", () => this.list.pair(this.group)),
      link("as a list", `#list?${new URLSearchParams({ group: this.group, sort: "reward", desc: "1" })}`),
      ...(this.rows.length ? [link("save as a page", exportHref(this.list.names))] : []),
    );
    this.home.replaceChildren(
      tools,
      element("h1", "problem", problem),
      element("p", "count", count),
      element("ol", "cards", ...this.cards),
      ...(this.total > CARDS
        ? [element("nav", "pages", turn("previous", -1, this.offset > 0), " ", turn("next", 1, last < this.total))]
        : []),
    );
    this.cards.forEach((card) => this.observer.observe(card));
    this.point();
  }

  card(row, index) {
    const name = row.sample === null ? row.name.split("/").at(-1) : `sample ${row.sample}`;
    const facts = [
      `reward ${shown(row.reward)}`,
      row.stop,
      `${shown(row.chunks)} chunk${row.chunks === 1 ? "" : "s"}`,
      `${shown(row.length)} tokens`,
    ];
    const head = element("h2", "", link(`${this.offset + index + 1}. ${name}`, this.list.href(row.name)));
    head.title = row.name;
    const body = element("div", "trace", "…");
    const card = element("li", "card", head, element("p", "count", facts.join(" · ")), body);
    card.dataset.index = index;
    card.addEventListener("click", (event) => {
      this.current = index;
      this.point();
      if (!event.target.closest("a")) location.hash = this.list.href(row.name);
    });
    return card;
  }

  intersect(entries) {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      this.observer.unobserve(target);
      this.fill(target, this.rows[Number(target.dataset.index)].name);
    }
  }

  async fill(card, name) {
    const body = card.querySelector(".trace");
    try {
      body.innerHTML = await (await ask("api/card", { name })).text(); // escaped by the server
    } catch (error) {
      body.textContent = error.message;
    }
  }

  point() {
    this.cards.forEach((card, index) => {
      card.classList.toggle("current", index === this.current);
      card.classList.toggle("marked", this.rows[index].name === this.list.marked);
      card.querySelector("h2 a").href = this.list.href(this.rows[index].name);
    });
  }

  back() {
    go("list", this.list.parameters || {});
  }

  move(step) {
    this.current = Math.max(0, Math.min(this.rows.length - 1, this.current + step));
    this.point();
    this.cards[this.current]?.scrollIntoView({ block: "nearest" });
  }

  turn(step) {
    const offset = Math.max(0, this.offset + step * CARDS);
    if (offset >= this.total || offset === this.offset) return;
    this.current = 0;
    go("group", { group: this.group, offset });
  }

  key(event) {
    const row = this.rows[this.current];
    const actions = {
      j: () => this.move(1),
      ArrowDown: () => this.move(1),
      ArrowRight: () => this.move(1),
      k: () => this.move(-1),
      ArrowUp: () => this.move(-1),
      ArrowLeft: () => this.move(-1),
      "[": () => this.turn(-1),
      "]": () => this.turn(1),
      b: () => this.list.pair(this.group),
      m: () => {
        if (row) this.list.mark(row.name);
        this.point();
      },
      x: () => this.home.querySelector('a[href^="api/export"]')?.click(),
    };
    if (event.key === "Enter" && !event.target.closest("a, button") && row) {
      location.hash = this.list.href(row.name);
      return true;
    }
    if (!actions[event.key]) return false;
    actions[event.key]();
    return true;
  }
}
