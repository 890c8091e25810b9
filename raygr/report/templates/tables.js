// Tables of the page: a click on a header sorts, a box above long tables searches, wide ones say that they scroll.
(() => {
  const searchedFrom = 8;  // rows

  // The number that a cell starts with: "1,234" and "+12.3%*" are numbers, "–" is none.
  const numberOf = (text) => {
    const found = text.trim().replace(/,/g, "").match(/^[+-]?[0-9]*[.]?[0-9]+(e[+-]?[0-9]+)?/i);
    return found ? parseFloat(found[0]) : NaN;
  };

  const compare = (left, right) => {
    const [a, b] = [numberOf(left), numberOf(right)];
    if (!isNaN(a) && !isNaN(b)) return a - b;
    return left.localeCompare(right, undefined, { numeric: true });
  };

  const sortBy = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const text = (row) => row.cells[column].textContent;
    const isEmpty = (row) => ["", "–"].includes(text(row).trim());
    rows.sort((left, right) => {
      if (isEmpty(left) || isEmpty(right)) return isEmpty(left) - isEmpty(right);  // rows without a value come last
      return (descending ? -1 : 1) * compare(text(left), text(right));
    });
    body.append(...rows);
  };

  for (const box of document.querySelectorAll(".table")) {
    const table = box.querySelector("table");
    const headers = [...table.tHead.rows[0].cells];
    if (table.tBodies[0].rows.length > 2) {
      headers.forEach((header, column) => {
        if (!header.textContent.trim()) return;
        const button = document.createElement("button");
        button.type = "button";
        button.append(...header.childNodes);
        header.append(button);
        button.addEventListener("click", () => {
          const descending = header.getAttribute("aria-sort") === "ascending";
          headers.forEach((one) => one.removeAttribute("aria-sort"));
          header.setAttribute("aria-sort", descending ? "descending" : "ascending");
          sortBy(table, column, descending);
        });
      });
    }
    if (table.tBodies[0].rows.length >= searchedFrom) {
      const search = document.createElement("input");
      search.type = "search";
      search.className = "search";
      search.placeholder = "Search this table";
      search.setAttribute("aria-label", "Search: " + table.caption.textContent);
      search.addEventListener("input", () => {
        const wanted = search.value.toLowerCase();
        for (const row of table.tBodies[0].rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
      });
      box.prepend(search);
    }
    const hint = document.createElement("p");
    hint.className = "hint";
    hint.textContent = "Scroll sideways for more columns →";
    box.prepend(hint);
  }

  const markWide = () => {
    for (const box of document.querySelectorAll(".table")) {
      const scroll = box.querySelector(".scroll");
      box.classList.toggle("wide", scroll.scrollWidth > scroll.clientWidth + 1);
    }
  };
  addEventListener("resize", markWide);
  document.addEventListener("toggle", markWide, true);  // tables of the appendix have a width once they are unfolded
  markWide();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
})();
