"use strict";
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  const touched = matchMedia("(pointer: coarse)");
  const FRAMES_PER_SECOND = 6;

  // ------------------------------------------------------------- figures
  const plots = new Map();
  for (const node of document.querySelectorAll(".figure")) {
    plots.set(node, JSON.parse(node.firstElementChild.textContent));
    node.replaceChildren();
  }

  function styled(plot, marks) {
    const style = getComputedStyle(document.documentElement);
    const variable = (name) => style.getPropertyValue(`--${name}`).trim();
    const [ink, line, surface] = ["ink", "line", "surface"].map(variable);
    const series = variable("series").split(/\s+/);
    const colour = (number) => series[number % series.length];
    const data = plot.data.map((trace) => ({
      ...trace,
      ...(trace.type === "heatmap" && {
        colorscale: [[0, surface], [1, variable("accent")]],
      }),
      ...(trace.type === "scatter" && {
        line: { ...trace.line, color: colour(trace.meta) },
        marker: { ...trace.marker, color: colour(trace.meta) },
      }),
      ...(trace.type === "bar" && {
        marker: { color: colour(trace.meta) },
        textfont: { color: surface },
      }),
    }));
    const axis = {
      automargin: true,
      gridcolor: line,
      linecolor: line,
      zeroline: false,
      title: { standoff: 6 },
    };
    const layout = {
      ...plot.layout,
      template: {},
      dragmode: touched.matches ? false : "zoom",
      font: { family: "inherit", size: 11, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 8, r: 10, t: 8, b: 8 },
      legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom" },
      hoverlabel: { bgcolor: surface, bordercolor: line, font: { color: ink } },
      shapes: (marks || []).map(([x, dash]) => ({
        type: "line",
        x0: x,
        x1: x,
        yref: "paper",
        y0: 0,
        y1: 1,
        line: { color: ink, width: 1, dash },
      })),
    };
    for (const name of ["xaxis", "yaxis"]) {
      const own = plot.layout[name] || {};
      layout[name] = { ...axis, ...own, title: { ...axis.title, ...own.title } };
    }
    return [data, layout];
  }

  function draw(node, marks) {
    const config = { displayModeBar: false, responsive: true };
    return Plotly.react(node, ...styled(plots.get(node), marks), config);
  }

  // ------------------------------------------------------------- players
  const redraws = [];
  for (const player of document.querySelectorAll(".player")) {
    const films = [...player.querySelectorAll(".frames")];
    const counts = films.map((film) => Number(film.style.getPropertyValue("--frames")));
    const total = Math.max(...counts);
    const button = player.querySelector(".play");
    const slider = player.querySelector("input");
    const output = player.querySelector("output");
    const plot = player.querySelector(".figure");
    const name = button.getAttribute("aria-label").replace("Play ", "");
    slider.max = total - 1;
    let timer = null;

    const marks = () => [
      [Number(player.dataset.onset) - 0.5, "dash"],
      [Number(slider.value), "solid"],
    ];
    function show(frame) {
      slider.value = frame;
      output.value = `${frame + 1} of ${total}`;
      films.forEach((film, i) => {
        film.style.setProperty("--frame", Math.floor((frame * counts[i]) / total));
      });
      if (plot && plot.layout) {
        Plotly.relayout(plot, { "shapes[1].x0": frame, "shapes[1].x1": frame });
      }
    }
    function play(on) {
      clearInterval(timer);
      timer = null;
      if (on) {
        const next = () => show((Number(slider.value) + 1) % total);
        timer = setInterval(next, 1000 / FRAMES_PER_SECOND);
      }
      button.textContent = on ? "Pause" : "Play";
      button.setAttribute("aria-label", `${button.textContent} ${name}`);
    }
    button.addEventListener("click", () => play(timer === null));
    slider.addEventListener("input", () => {
      play(false);
      show(Number(slider.value));
    });
    show(0);
    if (plot) {
      show(Math.min(total - 1, Number(player.dataset.onset)));
      redraws.push([plot, marks]);
      draw(plot, marks()).then(() => {
        plot.on("plotly_hover", (event) => {
          play(false);
          show(Math.round(event.points[0].x));
        });
      });
    } else if (!still.matches && "IntersectionObserver" in window) {
      // Plays while it is visible, until the reader uses the controls.
      let untouched = true;
      for (const control of [button, slider]) {
        control.addEventListener("pointerdown", () => (untouched = false));
        control.addEventListener("keydown", () => (untouched = false));
      }
      new IntersectionObserver((entries) => {
        if (untouched) play(entries[entries.length - 1].isIntersecting);
      }).observe(player);
    }
  }

  const paired = new Set(redraws.map(([node]) => node));
  const others = [...plots.keys()].filter((node) => !paired.has(node));
  others.forEach((node) => draw(node));
  dark.addEventListener("change", () => {
    others.forEach((node) => draw(node));
    redraws.forEach(([node, marks]) => draw(node, marks()));
  });
})();
