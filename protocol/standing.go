package protocol

// Behind lists the replicas that do not hold the primary's last cut, by name.
func (p *Primary) Behind() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var behind []string
	for _, w := range p.workers {
		if w.holds != p.state.Lineage.Tip().Epoch {
			behind = append(behind, w.cfg.Name)
		}
	}
	return behind
}

// Superseded says whether a primary's copy was left behind by another: that went
// on from what the copy holds, or took over from it while it went on as before. Of two
// that both took over from a third neither is, nor of two where one took over and the
// other began anew in a generation of its own: whether one serves decides there.
func Superseded(mine, other Lineage) bool {
	switch rel := Compare(mine, other); rel.Kind {
	case Behind:
		return true
	case Diverged:
		return wentOn(mine, rel.Common) && !wentOn(other, rel.Common)
	}
	return false
}
