// What the portal's pages do where scripts run. Every page works without.
"use strict";

(() => {
  const each = (root, selector, fn) => {
    if (root.matches && root.matches(selector)) fn(root);
    root.querySelectorAll(selector).forEach(fn);
  };

  // A chart of the numbers of a table: times in the first column, then allowed and refused.
  const chart = (box) => {
    const rows = [...document.getElementById(box.dataset.chart).tBodies[0].rows];
    const style = getComputedStyle(document.documentElement);
    const color = (name) => () => style.getPropertyValue(name).trim(); // as it is when it is drawn
    const data = [
      rows.map((r) => Date.parse(r.querySelector("time").dateTime) / 1000),
      rows.map((r) => Number(r.cells[1].dataset.n)),
      rows.map((r) => Number(r.cells[2].dataset.n)),
    ];
    const day = uPlot.fmtDate("{D} {MMM}"), time = uPlot.fmtDate("{HH}:{mm}");
    const utc = (seconds) => uPlot.tzDate(new Date(seconds * 1000), "UTC");
    const label = (seconds) => (box.dataset.interval === "day" || seconds % 86400 === 0 ? day : time)(utc(seconds));
    const axis = { stroke: color("--chart-text"), grid: { stroke: color("--chart-grid"), width: 1 }, ticks: { show: false } };
    const size = () => ({ width: Math.max(box.clientWidth, 200), height: 200 });
    const plot = new uPlot({
      ...size(),
      tzDate: utc,
      cursor: { drag: { x: false, y: false } },
      scales: { y: { range: (_, min, max) => [0, Math.max(max, 5)] } },
      axes: [{ ...axis, values: (_, splits) => splits.map(label) }, { ...axis, size: 55 }],
      series: [
        { value: "{YYYY}-{MM}-{DD} {HH}:{mm}", label: "UTC" },
        { label: "Allowed", stroke: color("--chart-allowed"), width: 2 },
        { label: "Refused", stroke: color("--chart-refused"), width: 2, dash: [4, 3] },
      ],
    }, data, box);
    new ResizeObserver(() => box.isConnected ? plot.setSize(size()) : plot.destroy()).observe(box);
    for (const query of ["(prefers-color-scheme: dark)", "(forced-colors: active)"]) {
      matchMedia(query).addEventListener("change", () => box.isConnected && plot.redraw());
    }
  };

  // Fields that say something only while something else is chosen.
  const when = (box) => {
    const [name, value] = box.dataset.when.split("=");
    const form = box.closest("form");
    const update = () => { box.hidden = form.elements[name].value !== value; };
    form.addEventListener("change", update);
    update();
  };

  // A secret: masked, to copy, to save, and gone when the page is left, also for who comes back to it.
  const secret = (box) => {
    const field = box.querySelector("textarea");
    const said = box.querySelector("[data-said]");
    const value = field.value;
    const button = (what) => box.querySelector(`[data-do="${what}"]`);
    let shown = true;
    const show = (yes) => {
      shown = yes;
      field.value = yes ? value : "•".repeat(value.length);
      button("mask").textContent = yes ? "Hide" : "Show";
    };
    box.querySelector(".tools").hidden = false;
    show(false);
    button("mask").addEventListener("click", () => show(!shown));
    button("copy").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(value);
      } catch {
        // Not allowed, or not over TLS: as it was done before there was a clipboard for scripts.
        const was = shown;
        show(true);
        field.select();
        const done = document.execCommand("copy");
        show(was);
        if (!done) {
          said.textContent = "It could not be copied: show it, and copy it by hand.";
          return;
        }
      }
      said.textContent = "Copied. Whatever reads the clipboard can read it.";
    });
    button("save").addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([value + "\n"], { type: "text/plain" }));
      link.download = box.dataset.file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
      said.textContent = `Saved as ${box.dataset.file}.`;
    });
    window.addEventListener("pagehide", () => {
      field.value = "";
      field.textContent = "";
      box.replaceChildren("The secret was shown once, and is not here any more.");
    });
  };

  // A button that copies what its page shows elsewhere.
  const copy = (button) => {
    const from = document.querySelector(button.dataset.copy), said = button.nextElementSibling;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(from.textContent);
        said.textContent = "Copied.";
      } catch {
        window.getSelection().selectAllChildren(from);
        said.textContent = "It is selected: copy it by hand.";
      }
    });
  };

  const enhance = (root) => {
    each(root, "[data-copy]", copy);
    each(root, "[data-chart]", chart);
    each(root, "[data-when]", when);
    each(root, "[data-secret]", secret);
  };
  enhance(document);

  // Parts that refresh themselves: not under somebody's hands, and what was open stays open.
  let open = [];
  document.addEventListener("htmx:beforeRequest", (event) => {
    const at = event.detail.elt;
    if (at.id === "usage" && (document.hidden || at.contains(document.activeElement))) event.preventDefault();
  });
  document.addEventListener("htmx:beforeSwap", (event) => {
    open = [...event.detail.target.querySelectorAll("details[open]")].map((d) => d.id);
  });
  document.addEventListener("htmx:afterSwap", () => {
    open.forEach((id) => id && document.getElementById(id)?.setAttribute("open", ""));
    open = [];
  });
  document.addEventListener("htmx:load", (event) => { if (event.detail.elt !== document.body) enhance(event.detail.elt); });
})();
