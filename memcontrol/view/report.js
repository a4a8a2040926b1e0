const line = document.querySelector('.told'), of = n => document.querySelectorAll(`[data-trial="${n}"]`);

function show(n) {
  document.querySelectorAll('.on').forEach(e => e.classList.remove('on'));
  of(n).forEach(e => e.classList.add('on'));
  const point = document.querySelector(`.point[data-trial="${n}"] title`);
  if (point) line.textContent = point.textContent;
}

document.querySelectorAll('[data-trial]').forEach(
  e => ['mouseenter', 'focus', 'click'].forEach(kind => e.addEventListener(kind, () => show(e.dataset.trial)))
);
