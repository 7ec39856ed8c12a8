//! Time per token against tokens, both logarithmic, as an SVG or a PNG file.

use super::shape::Shape;
use crate::models::Gate;
use anyhow::{Result, anyhow, bail};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use std::path::Path;

/// One implementation's time for one shape.
pub struct Timed {
    /// Whose.
    pub name: &'static str,
    /// Of what.
    pub shape: Shape,
    /// Seconds, the median.
    pub seconds: f64,
}

/// One implementation on one setting.
struct Line {
    label: String,
    ours: bool,
    /// (tokens, microseconds a token)
    points: Vec<(f64, f64)>,
}

/// How the library is called in plots.
pub const OURS: &str = "deltanet";

const SIZE: (u32, u32) = (960, 600);
const FONT: &str = "sans-serif";

/// Draws `times` to `file`, in the format that its name ends with.
pub fn draw(file: &Path, title: &str, times: &[Timed]) -> Result<()> {
    // Bitmaps are drawn without the system's fonts, of which a server may have none.
    register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT)
        .map_err(|_| anyhow!("the font cannot be read"))?;
    let lines = lines(times);
    match file.extension().and_then(|ending| ending.to_str()) {
        Some("svg") => chart(SVGBackend::new(file, SIZE).into_drawing_area(), title, &lines),
        Some("png") => chart(BitMapBackend::new(file, SIZE).into_drawing_area(), title, &lines),
        _ => bail!("--plot {}: the file must end in .svg or .png", file.display()),
    }
}

/// One line for each implementation and setting, in the order in which they were timed.
fn lines(times: &[Timed]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for Timed { name, shape, seconds } in times {
        let several = |what: fn(&Shape) -> usize| times.iter().any(|other| what(&other.shape) != what(shape));
        let mut label = format!("{name} {}/{}", shape.key_heads, shape.value_heads);
        if several(|shape| shape.head_size) {
            label += &format!(", S {}", shape.head_size);
        }
        if several(|shape| shape.sequences) {
            label += &format!(", {} sequences", shape.sequences);
        }
        if several(|shape| usize::from(shape.gate == Gate::Channel)) {
            label += &format!(", {} gate", shape.gate.name());
        }
        let point = (shape.tokens as f64, seconds * 1e6 / (shape.tokens * shape.sequences) as f64);
        match lines.iter_mut().find(|line| line.label == label) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { label, ours: *name == OURS, points: vec![point] }),
        }
    }
    lines
}

fn chart<B: DrawingBackend>(area: DrawingArea<B, Shift>, title: &str, lines: &[Line]) -> Result<()>
where
    B::ErrorType: 'static,
{
    let points = || lines.iter().flat_map(|line| line.points.iter().copied());
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
        low / 1.3..high * 1.3
    };
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, (FONT, 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(
            bounds(&mut points().map(|(x, _)| x)).log_scale(),
            bounds(&mut points().map(|(_, y)| y)).log_scale(),
        )?;
    chart
        .configure_mesh()
        .x_desc("tokens")
        .y_desc("µs per token")
        .x_label_formatter(&|tokens| format!("{tokens:.0}"))
        .label_style((FONT, 14))
        .light_line_style(WHITE.mix(0.0))
        .draw()?;
    for (at, line) in lines.iter().enumerate() {
        let colour = Palette99::pick(at).stroke_width(if line.ours { 3 } else { 2 });
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), colour).point_size(3))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
    }
    chart
        .configure_series_labels()
        // Time a token falls with the tokens: this corner is free.
        .position(SeriesLabelPosition::LowerLeft)
        .label_font((FONT, 14))
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times() -> Vec<Timed> {
        let shape =
            |tokens| Shape { key_heads: 16, value_heads: 32, head_size: 128, gate: Gate::Head, tokens, sequences: 1 };
        let timed = |name, tokens, seconds| Timed { name, shape: shape(tokens), seconds };
        vec![timed(OURS, 1, 1e-4), timed("ggml", 1, 2e-4), timed(OURS, 64, 1e-3), timed("ggml", 64, 5e-3)]
    }

    #[test]
    fn each_implementation_is_one_line() {
        let lines = lines(&times());
        assert_eq!(lines.iter().map(|line| line.label.as_str()).collect::<Vec<_>>(), ["deltanet 16/32", "ggml 16/32"]);
        assert_eq!(lines[1].points, [(1.0, 200.0), (64.0, 5e3 / 64.0)]);
    }

    #[test]
    fn both_formats_are_written_and_no_other() {
        let folder = std::env::temp_dir().join(format!("deltanet-plot-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        for (name, begins) in [("plot.svg", b"<svg".as_slice()), ("plot.png", b"\x89PNG".as_slice())] {
            let file = folder.join(name);
            draw(&file, "a title", &times()).expect("a plot");
            let bytes = std::fs::read(&file).expect("a file");
            assert!(bytes.starts_with(begins), "{name} begins with {:?}", bytes.get(..8));
            // Drawn, not empty: lines and their labels.
            let drawn = match String::from_utf8(bytes.clone()) {
                Ok(text) => text.matches("<polyline").count() >= 2 && text.contains("ggml 16/32"),
                Err(_) => bytes.len() > 4000,
            };
            assert!(drawn, "{name}: {} bytes", bytes.len());
        }
        let error = draw(&folder.join("plot.gif"), "", &times()).expect_err("an unknown format");
        assert!(error.to_string().contains(".png"), "{error}");
        std::fs::remove_dir_all(&folder).expect("it is ours");
    }
}
