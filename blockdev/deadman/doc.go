// Package deadman ends a stop of writers, come what may. An agent suspends
// devices or freezes file systems for some milliseconds; were it killed or
// stopped then, they would stay so. So a small process of its own, the
// dead-man, is told before each stop and resumes or thaws, at the latest at a
// limit or when the agent's connection closes. Its answer that this was in time
// is what makes a cut valid.
//
// Its service also holds the deadlines of leases: when one passes, everything on
// the device fails.
package deadman
