//! Time per token against tokens, both logarithmic, as an SVG file.

use anyhow::{Result, ensure};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// One implementation on one setting.
pub struct Line {
    pub label: String,
    pub ours: bool,
    /// (tokens, microseconds a token)
    pub points: Vec<(f64, f64)>,
}

const SIZE: (u32, u32) = (960, 600);

/// Draws the lines to `file`.
pub fn draw(file: &Path, title: &str, lines: &[Line]) -> Result<()> {
    ensure!(
        file.extension().is_some_and(|ending| ending == "svg"),
        "--plot {}: the file must end in .svg",
        file.display()
    );
    chart(SVGBackend::new(file, SIZE).into_drawing_area(), title, lines)
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
        .caption(title, ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(
            bounds(&mut points().map(|(x, _)| x)).log_scale(),
            bounds(&mut points().map(|(_, y)| y)).log_scale(),
        )?;
    chart.configure_mesh().x_desc("tokens").y_desc("µs per token").draw()?;
    for (at, line) in lines.iter().enumerate() {
        let colour = Palette99::pick(at).stroke_width(if line.ours { 3 } else { 1 });
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), colour).point_size(3))?
            .label(&line.label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}
